"""Parses the command line and runs one of the commands.

Nothing heavy is imported here: `--help` answers at once, and a command imports JAX
when it runs.
"""

import argparse
import importlib
import math
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from sdjax.errors import SdjaxError

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("diffusers", "single-file", "orbax")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BAD_INPUT, INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error of sdjax."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"sdjax: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, without the program's name.

    Returns:
        The exit status: 0, 2 for bad input, 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            importlib.import_module(f"sdjax.cli.{args.command}").run(args)
            sys.stdout.flush()
        except SdjaxError as error:
            _say(f"error: {error}")
            return BAD_INPUT
        except KeyboardInterrupt as error:
            _say(": ".join(filter(None, ("interrupted", str(error)))))
            return INTERRUPTED
        except BrokenPipeError:  # whoever read the output, as `head`, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _say(message: str) -> None:
    print(f"sdjax: {' '.join(message.splitlines())}", file=sys.stderr)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    _say(f"warning: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sdjax", description="Stable Diffusion in JAX.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_convert(commands)
    _add_info(commands)
    return parser


def _command(commands, name: str, summary: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=summary, description=f"{summary}.", allow_abbrev=False
    )


def _add_generate(commands) -> None:
    parser = _command(commands, "generate", "Make images from prompts")
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to show")
    _add_model(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="FILE.png, which is replaced, or a folder, in which images are numbered "
        "and none is replaced (default: sdjax-SEED-NUMBER.png here)",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="IMAGE",
        help="make this image of sdjax again; what else is given here replaces its own",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    numbers = parser.add_argument_group("numbers")
    numbers.add_argument("--height", type=int, metavar="PIXELS")
    numbers.add_argument("--width", type=int, metavar="PIXELS")
    _add_numbers(numbers)
    parser.add_argument(
        "--sampler", help="ddim, euler_a, dpmpp_2m_karras, ... (default: the model's)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights and networks (default: the model's)"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _add_numbers(group) -> None:
    """What steers sampling; unset is None, so that `--from` can tell."""
    add = group.add_argument
    add("--steps", type=int, dest="num_inference_steps", help="default: 30")
    add("--guidance-scale", type=_finite, metavar="SCALE", help="default: 7.5")
    add("--guidance-rescale", type=_finite, metavar="PHI", help="default: 0")
    add("--eta", type=_finite, help="noise that DDIM adds, 0 to 1")
    add("--seed", type=int, help="default: 0")
    add(
        *("-n", "--num-images-per-prompt"),
        type=_positive,
        metavar="N",
        help="default: 1",
    )
    add("--clip-skip", type=int, metavar="LAYERS", help="text layers to leave out")


def _add_convert(commands) -> None:
    parser = _command(commands, "convert", "Write a model in another format")
    parser.add_argument("model", metavar="SRC", help="as generate's --model")
    parser.add_argument("destination", metavar="DST", help="a new file or folder")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="default: single-file if DST ends in .safetensors, else diffusers",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: as in SRC")
    _add_loading(parser)


def _add_info(commands) -> None:
    parser = _command(commands, "info", "Describe a model, checkpoint or image")
    parser.add_argument("path", metavar="MODEL|CHECKPOINT|IMAGE")
    _add_variant(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        metavar="PATH",
        help="a diffusers folder, a .safetensors or .ckpt file, or an Orbax folder",
    )
    _add_loading(parser)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    """What `sdjax.load` takes besides the path."""
    _add_variant(parser)
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="for a model that comes without one"
    )
    parser.add_argument(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="of a single file of SD 2, which does not tell",
    )


def _add_variant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variant", metavar="NAME", help="of a diffusers folder's files, as fp16"
    )


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return value
