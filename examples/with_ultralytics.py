"""Fine-tune with Ultralytics, whose trainer builds the model, compiles it with Inductor, and calls `model.train()`.

A small classifier of its layers learns scikit-learn's digits, as images on disk. Needs `pip install '.[frameworks]'`.
"""

from pathlib import Path
from typing import Any

import torch
import typer
from digits import data
from torch._dynamo.utils import counters
from torchvision.transforms.functional import to_pil_image
from ultralytics import YOLO
from ultralytics.utils.torch_utils import unwrap_model

import triton_convbn

MODEL = """
nc: 10
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, C2f, [32, True]]
head:
  - [-1, 1, Classify, [nc]]
"""


def images(folder: Path, count: int) -> None:
    """Write digits as PNG files, in one folder for each digit, to train and to validate with."""
    x, y, x_val, y_val = data()
    for split, split_x, split_y in (("train", x, y), ("val", x_val, y_val)):
        for index, (image, digit) in enumerate(zip(split_x[:count], split_y[:count], strict=True)):
            target = folder / split / str(digit.item())
            target.mkdir(parents=True, exist_ok=True)
            to_pil_image(image.expand(3, -1, -1)).resize((32, 32)).save(target / f"{index}.png")


def main(epochs: int = 3, count: int = 1024, compiled: bool = True, out: Path = Path("out/with_ultralytics")) -> None:
    """Print the first and the last loss, and how many BatchNorms are folded."""
    images(out / "digits", count)
    (out / "digits-cls.yaml").write_text(MODEL)
    torch._functorch.config.enable_autograd_cache = False  # a graph from the cache is not counted
    triton_convbn.patch()  # the trainer has no argument for the backend's name
    model, losses = YOLO(out / "digits-cls.yaml"), []

    def freeze(trainer: Any) -> None:
        if trainer.epoch == 1:  # this model learns its statistics first; freeze a pretrained one from the start
            triton_convbn.freeze_statistics(unwrap_model(trainer.model))

    model.add_callback("on_train_epoch_start", freeze)
    model.add_callback("on_train_batch_end", lambda trainer: losses.append(trainer.loss.item()))
    model.train(
        data=out / "digits", epochs=epochs, imgsz=32, batch=32, compile=compiled, device="cpu", workers=0, amp=False,
        optimizer="Adam", lr0=0.01, warmup_epochs=0, auto_augment="", erasing=0.0, scale=1.0, fliplr=0.0,
        plots=False, save=False, val=False, verbose=False, project=out.resolve(),
    )  # fmt: skip
    print(f"{counters['triton_convbn']['folded']} BatchNorms folded")
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


if __name__ == "__main__":
    typer.run(main)
