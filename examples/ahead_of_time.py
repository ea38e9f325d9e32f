"""Compile ahead of time: export, fold once, compile into a package, load it, and compare with the model.

The package has the folded parameters and folds nothing when it runs. Needs a C++ compiler.
"""

import tempfile
import time
from pathlib import Path

import torch
import typer
from digits import data, pretrained

import triton_convbn


def main(pretrain_steps: int = 80) -> None:
    model = pretrained(0, pretrain_steps)
    _, _, x, _ = data()
    ep = torch.export.export(model, (x[:4],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=512)},))
    print(triton_convbn.explain(ep))
    folded = triton_convbn.fold_exported(ep, on_decline="raise")
    print(f"state dict: {len(ep.state_dict)} tensors, folded {len(folded.state_dict)}")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = torch._inductor.aoti_compile_and_package(folded, package_path=str(Path(folder) / "digits.pt2"))
        print(f"compiled and packaged in {time.perf_counter() - start:.0f} s", flush=True)
        run = torch._inductor.aoti_load_package(path)
        with torch.no_grad():
            for batch in (1, 7, 500):
                torch.testing.assert_close(run(x[:batch]), model(x[:batch]), rtol=1e-4, atol=1e-4)
    print("the package returns what the model returns, at batches of 1, 7 and 500")


if __name__ == "__main__":
    typer.run(main)
