"""python -m memkernel.training FOLDER: train a small model, or go on with a run that was interrupted."""

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from memkernel.training.train import Settings, Trainer, train


def main() -> None:
    parser = argparse.ArgumentParser("memkernel.training", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the run is kept and the checkpoint is written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save-every", type=int, default=200, help="steps between saves of the run's state")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    torch.set_num_threads(args.pop("threads"))
    save_every = args.pop("save_every")
    trainer = Trainer(args.pop("folder"), Settings(**args))
    if trainer.resume():
        print(f"resumed at step {trainer.step}")
    parameters = sum(weight.numel() for weight in trainer.weights.values())
    print(f"{parameters:,} parameters", flush=True)
    train(trainer, lambda line: print(line, flush=True), save_every=save_every)


if __name__ == "__main__":
    main()
