"""Where rows of log.jsonl go besides the file: tensorboard, wandb, trackio."""

import importlib
import os
from pathlib import Path

from twins.errors import UserError, first_line


def start_logger(config):
    """A function that sends a row of log.jsonl to --logger. Raises UserError if that is not installed.

    If it fails in another way, such as without its server, the run goes on without it.
    """
    name, out_dir = config["logger"], config["out_dir"]
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(out_dir)
            return lambda row: [writer.add_scalar(key, value, row["step"]) for key, value in row.items()]
        if name:  # wandb, and trackio, which has the same functions
            library = importlib.import_module(name)
            os.environ.setdefault("WANDB_DIR", out_dir)
            library.init(project="dino-twins", name=Path(out_dir).name, config=config)
            return lambda row: library.log(row, step=row["step"])
    except ImportError:
        raise UserError(
            f"--logger={name} needs a package that is not installed: pip install {name}"
        ) from None
    except Exception as error:
        print(
            f"warning: --logger={name} fails, training continues without it ({first_line(error)})", flush=True
        )
    return lambda row: None
