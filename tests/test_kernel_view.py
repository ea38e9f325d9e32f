"""What `triton-convbn kernel` shows, and how many launches ResNet-50 takes."""

import json

import pytest
import torch
from checking import counted, scramble
from torch import fx, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition

from triton_convbn import ConvBNPass, Options
from triton_convbn.cli import main
from triton_convbn.kernel_view import kernels_of

torchvision = pytest.importorskip("torchvision")
fold_op, BACKWARD = "triton_convbn.fold.default", "triton_convbn.fold_backward.default"


def small():
    return scramble(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)).eval())


def test_resnet50_takes_four_launches_each_way():
    views = kernels_of(torchvision.models.resnet50().eval(), [torch.randn(1, 3, 64, 64)], Options())
    assert [view.direction for view in views] == ["forward"] * 4 + ["backward"] * 4
    assert [len(view.pairs) for view in views] == [16, 16, 16, 5] * 2
    assert views[0].pairs[:2] == ("bn1", "layer1.0.bn1")
    assert len({name for view in views[:4] for name in view.pairs}) == 53
    weights = sum(p.numel() for n, p in torchvision.models.resnet50().named_parameters() if p.ndim == 4)
    channels = 26560
    forward = sum(view.source.bytes_moved for view in views[:4])
    assert forward == 4 * (2 * weights + 5 * channels), "each weight is read once and written once, and the vectors"


def launches(model, x, **options):
    """How often each graph of a training step folds and differentiates a fold, without running or compiling it."""
    found = {}

    def counting(which):
        def compiler(gm, _inputs):
            targets = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
            found[which] = (targets.count(fold_op), targets.count(BACKWARD))
            kept = [n.meta["val"] for n in gm.graph.find_nodes(op="output")[0].args[0] if isinstance(n, fx.Node)]
            if which == "forward":
                folded = {n for n in gm.graph.nodes if n.op == "call_function" and str(n.target) == fold_op}
                outputs = gm.graph.find_nodes(op="output")[0].args[0]
                found["kept folds"] = sum(n.op == "call_function" and n.args and n.args[0] in folded for n in outputs)
            assert kept
            return gm.forward

        return compiler

    def backend(gm, inputs):
        ConvBNPass(**options)(gm.graph)
        gm.recompile()
        return aot_module_simplified(
            gm,
            inputs,
            fw_compiler=counting("forward"),
            bw_compiler=counting("backward"),
            partition_fn=min_cut_rematerialization_partition,
        )

    torch.compile(model, backend=backend)(x).sum().backward()
    return found


def test_resnet50_training_launches(monkeypatch):
    """Four folds forward; four more and their four derivatives backward. No folded weight is kept in between."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the operators are chosen; their values are another test's
    monkeypatch.setattr("triton_convbn.ops.registration.kernel_runs", lambda _device: False)
    model = torchvision.models.resnet50().eval()
    found = launches(model, torch.randn(2, 3, 64, 64))
    assert counted() == (53, {})
    assert found == {"forward": (4, 0), "backward": (4, 4), "kept folds": 0}


def test_kept_folds_are_not_launched_again(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = launches(small(), torch.randn(2, 4, 9, 8), recompute=False)
    assert found["forward"] == (1, 0)
    assert found["backward"] == (0, 1)
    assert found["kept folds"] > 0


def test_a_merged_sum_has_no_folds_of_its_own():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
            self.m, self.n, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4), small()

        def forward(self, x):
            return self.last(self.m(self.a(x)) + self.n(self.b(x)))

    views = kernels_of(scramble(Block().eval()), [torch.randn(1, 4, 8, 8)], Options())
    assert [view.pairs for view in views] == [("last.1", "last.3")] * 2


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["kernel", *arguments])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def test_command(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch.nn import BatchNorm2d, Conv2d, Sequential\n"
        "model = Sequential(Conv2d(3, 16, 3), BatchNorm2d(16), Conv2d(16, 64, 1), BatchNorm2d(64))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    common = ("--model", "mine:model", "--size", "8")
    code, out, _ = run(capsys, *common)
    assert code == 0
    assert out.count("@triton.jit") >= 2
    compile(out, "kernels", "exec")
    code, out, _ = run(capsys, *common, "--facts", "--json", "--arch", "sm_80")
    facts = [json.loads(line) for line in out.splitlines()]
    assert [fact["direction"] for fact in facts] == ["forward", "backward"]
    for fact in facts:
        assert fact["how"] == "compiled offline"
        assert fact["arch"] == "sm_80"
        assert fact["spills"] == 0
        assert 0 < fact["registers"] <= 64
        assert 128 in fact["load_bits"]
    code, out, err = run(capsys, *common, "--arch", "sm_1")
    assert (code, out) == (2, "")
    assert "choose one of sm_75" in err
