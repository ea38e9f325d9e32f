"""Run the examples as a reader does, with fewer steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parent.parent / "examples"


def printed(name: str, *arguments: str) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    env.pop("PYTHONSAFEPATH", None)  # the examples import one another
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text: str, before: str) -> list[float]:
    """Return the number in front of each occurrence of `before`."""
    return [float(part.split()[-1].strip("(,")) for part in text.split(before)[:-1]]


def test_digits(tmp_path: Path) -> None:
    """The accuracy is eager's within the noise of a seed, with less than 0.6 of its memory; the picture is written."""
    text = printed(
        "digits.py", "--no-codegen", "--seeds", "2", "--pretrain-steps", "25", "--steps", "25", "--out", str(tmp_path)
    )
    eager, ours = numbers(text, " MB kept")[-2:]
    assert ours < 0.6 * eager
    (line,) = [line for line in text.splitlines() if "from eager at most" in line]
    apart, noise = numbers(line, "%")
    assert apart <= max(noise, 0.5)
    scores = [float(line.split("%")[0].split()[-1]) for line in text.splitlines() if " MB kept" in line]
    assert min(scores) > 30, "nothing was learned"
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_adversarial() -> None:
    text = printed("adversarial.py", "--pretrain-steps", "25", "--steps", "4")
    eager, ours = numbers(text, "% under attack")
    (clean,) = numbers(text.splitlines()[0], "%")
    assert eager < clean
    assert abs(eager - ours) <= 0.5
    eager, ours = numbers(text, " MB kept")
    assert ours < 0.6 * eager


def test_branches() -> None:
    """Every block is one convolution, in training too. The losses are eager's, and so are the deployed scores."""
    text = printed("branches.py", "--pretrain-steps", "25", "--steps", "25")
    assert "3 blocks merged, 19 BatchNorms folded" in text
    (apart,) = numbers(text, " apart at most")
    assert apart < 1e-3
    eager, ours = numbers(text, " MB kept")
    assert ours < 0.25 * eager
    assert "4 convolutions and 0 BatchNorms deployed" in text
    (difference,) = numbers(text, " of the largest")
    assert difference < 1e-5


def test_detection_backbone() -> None:
    pytest.importorskip("torchvision")
    text = printed("detection_backbone.py", "--size", "64", "--batch", "1", "--norms", "1")
    assert "BatchNorm2d: 53 of 53 fold" in text
    eager, ours = numbers(text, " MB kept")
    assert ours < 0.6 * eager


def test_ahead_of_time() -> None:
    text = printed("ahead_of_time.py", "--pretrain-steps", "2")
    assert "5 of 5 fold" in text
    assert "the package returns what the model returns" in text


def test_with_torchvision() -> None:
    """All BatchNorms fold, although every epoch calls `model.train()`, and the network learns."""
    pytest.importorskip("torchvision")
    text = printed("with_torchvision.py", "--backend", "triton_convbn_eager")
    assert "12 BatchNorms folded" in text
    assert numbers(text, "% of the test set")[-1] > 80


FRAMEWORKS = {
    "accelerate": ("--backend", "triton_convbn_eager"),
    "lightning": ("--backend", "triton_convbn_eager"),
    "transformers": (),
}


def test_with_ultralytics(tmp_path: Path) -> None:
    pytest.importorskip("ultralytics")
    text = printed("with_ultralytics.py", "--out", str(tmp_path))
    assert "7 BatchNorms folded" in text
    assert numbers(text, " at last")[0] < numbers(text, " at first")[0]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_with_frameworks(framework: str) -> None:
    """All BatchNorms fold, although the framework puts the model into training mode, and the loss falls."""
    pytest.importorskip(framework)
    text = printed(f"with_{framework}.py", "--steps", "10", "--pretrain-steps", "25", *FRAMEWORKS[framework])
    assert "5 BatchNorms folded" in text
    first, last = numbers(text, " at first")[0], numbers(text, " at last")[0]
    assert last < first
