"""Parses the command line and runs one of the commands.

Nothing heavy is imported here: `--help` answers at once, and a command imports JAX
when it runs.
"""

import _thread
import argparse
import contextlib
import functools
import importlib
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
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
    status = _run(args, alone=argv is None)
    if argv is None and status == INTERRUPTED:
        # Threads of XLA and Orbax may still be at work, and crash in an interpreter
        # that is being taken down.
        os._exit(status)
    return status


def _run(args: argparse.Namespace, *, alone: bool) -> int:
    """Runs a command; `alone`: in a process that is there for nothing else."""
    with warnings.catch_warnings(), _hearing_interrupts():
        warnings.showwarning = _show_warning
        try:
            with _leaving_at_once() if alone else contextlib.nullcontext():
                command = importlib.import_module(f"sdjax.cli.{args.command}")
            command.run(args)
            if sys.stdout is not None:  # it was closed by the caller
                sys.stdout.flush()
        except SdjaxError as error:
            _say(f"error: {error}")
            return BAD_INPUT
        except KeyboardInterrupt as error:
            _say(": ".join(filter(None, ("interrupted", str(error)))))
            return INTERRUPTED
        except BrokenPipeError:  # whoever read the output, as `head`, has enough
            _drop_output()
        except OSError as error:  # files are told of where they are opened
            _say(f"error: cannot print: {error.strerror or error}")
            _drop_output()
            return BAD_INPUT
        except RuntimeError as error:
            if "initialize backend" not in str(error):
                raise
            _say(f"error: JAX has no such device: {error}")
            return BAD_INPUT
    return 0


def _drop_output() -> None:
    """Keeps Python from failing once more, at its end, on what is left to print."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _leaving_at_once() -> Iterator[None]:
    """Ctrl-C ends the process, since an import that it cuts off ends anyhow."""

    def leave(*_) -> NoReturn:
        _say("interrupted")
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _hearing_interrupts() -> Iterator[None]:
    """Ctrl-C is heard in those moments, too, in which Python drops exceptions.

    Such are the callbacks of its garbage collector, of which JAX has one.
    """
    before = sys.unraisablehook

    def hook(dropped, /) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.01, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


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
    _add_train(commands)
    _add_evaluate(commands)
    _add_shards(commands)
    _add_cache(commands)
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
        type=_name,
        metavar="OUT",
        help="FILE.png, which is replaced, or a folder, in which images are numbered "
        "and none is replaced (default: sdjax-SEED-NUMBER.png here)",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=_name,
        metavar="IMAGE",
        help="make this image of sdjax again; what else is given here replaces its own",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    numbers = parser.add_argument_group("numbers")
    numbers.add_argument("--height", type=_count, metavar="PIXELS")
    numbers.add_argument("--width", type=_count, metavar="PIXELS")
    _add_numbers(numbers)
    parser.add_argument(
        "--sampler",
        type=_name,
        help="ddim, euler_a, dpmpp_2m_karras, ... (default: the model's)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights and networks (default: the model's)"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _add_numbers(group) -> None:
    """What steers sampling; unset is None, so that `--from` can tell."""
    add = group.add_argument
    add("--steps", type=_count, dest="num_inference_steps", help="default: the model's")
    add("--guidance-scale", type=_real, metavar="SCALE", help="default: the model's")
    add("--guidance-rescale", type=_fraction, metavar="PHI", help="default: 0")
    add("--eta", type=_fraction, help="noise that DDIM adds, 0 to 1")
    add("--seed", type=_seed, help="default: 0")
    add(
        *("-n", "--num-images-per-prompt"),
        type=_count,
        metavar="N",
        help="default: 1",
    )
    add("--clip-skip", type=_natural, metavar="LAYERS", help="text layers to leave out")


def _add_convert(commands) -> None:
    parser = _command(commands, "convert", "Write a model in another format")
    parser.add_argument(
        "model", type=_name, metavar="SRC", help="as generate's --model"
    )
    parser.add_argument(
        "destination", type=_name, metavar="DST", help="a new file or folder"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="default: single-file if DST ends in .safetensors, else diffusers",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: as in SRC")
    _add_loading(parser)


def _add_info(commands) -> None:
    parser = _command(commands, "info", "Describe a model, training run or image")
    parser.add_argument("path", type=_name, metavar="MODEL|RUN|IMAGE")
    _add_variant(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_train(commands) -> None:
    parser = _command(commands, "train", "Train a model, or go on with its training")
    parser.add_argument(
        "config", type=_name, metavar="CONFIG.py", help="a file with get_config()"
    )
    parser.add_argument(
        "--workdir",
        type=_name,
        required=True,
        metavar="DIR",
        help="where checkpoints, samples and the model go; the same command goes on",
    )
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replace a field of the config, as --set optimizer.learning_rate=1e-4",
    )
    parser.add_argument("--no-progress", action="store_true", help="say nothing")


def _add_evaluate(commands) -> None:
    parser = _command(
        commands, "evaluate", "Draw known captions and judge the pictures"
    )
    parser.add_argument(
        "data", type=_name, metavar="DATA", help="captions with their true pictures"
    )
    parser.add_argument("-m", "--model", type=_name, default="emoji", metavar="PATH")
    parser.add_argument(
        "--among",
        type=_name,
        action="append",
        metavar="DATA",
        help="further pictures that a drawn one may be taken for",
    )
    parser.add_argument(
        "--limit", type=_count, metavar="N", help="so many captions, drawn at random"
    )
    parser.add_argument("--images-per-caption", type=_count, default=4, metavar="K")
    parser.add_argument("--batch-size", type=_count, default=64, metavar="B")
    add = parser.add_argument
    add("--steps", type=_count, dest="num_inference_steps", help="default: the model's")
    add("--guidance-scale", type=_real, metavar="SCALE", help="default: the model's")
    add("--sampler", type=_name, help="default: the model's")
    add("--seed", type=_seed, default=0, help="default: 0")
    add(
        *("-o", "--output"),
        type=_name,
        metavar="DIR",
        help="a new folder for report.json and the pictures, true beside drawn",
    )
    add("--json", action="store_true", help="print JSON")
    add("--no-progress", action="store_true", help="no progress bar")


def _add_shards(commands) -> None:
    parser = _command(commands, "shards", "Write pictures as TFDS ArrayRecord shards")
    parser.add_argument(
        "source", type=_name, metavar="SRC", help="tar shards, or a folder of pictures"
    )
    parser.add_argument("destination", type=_name, metavar="DST", help="a new folder")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _add_cache(commands) -> None:
    parser = _command(commands, "cache", "Encode a dataset once, for many epochs")
    add = parser.add_argument
    add("source", type=_name, metavar="DATA", help="pictures and captions")
    add("destination", type=_name, metavar="DST", help="a folder, for data.cache")
    add("-m", "--model", type=_name, default="emoji", metavar="PATH")
    add("--tokenizer", type=_name, metavar="FOLDER")
    add("--resolution", type=_count, metavar="PIXELS", help="default: the model's")
    add("--bucket-step", type=_count, metavar="PIXELS", help="keep aspect ratios")
    add("--text", action="store_true", help="encode the captions as well")
    add("--batch-size", type=_count, default=16, metavar="B")
    add("--no-progress", action="store_true", help="no progress bar")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        type=_name,
        metavar="PATH",
        help="a diffusers folder, a .safetensors or .ckpt file, or an Orbax folder "
        "(default: emoji, the bundled model)",
    )
    _add_loading(parser)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    """What `sdjax.load` takes besides the path."""
    _add_variant(parser)
    parser.add_argument(
        "--tokenizer",
        type=_name,
        metavar="FOLDER",
        help="for a model that comes without one",
    )
    parser.add_argument(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="of a single file of SD 2, which does not tell",
    )


def _add_variant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variant",
        type=_name,
        metavar="NAME",
        help="of a diffusers folder's files, as fp16",
    )


def _real(
    text: str, least: float = -sys.float_info.max, most: float = sys.float_info.max
) -> float:
    wanted = "a finite number"
    if most < sys.float_info.max:
        wanted = f"a number from {least:g} to {most:g}"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r:.80}")
    return value


def _whole(text: str, least: int, most: int | None = None) -> int:
    """Reads a number in a range; what depends on the model is checked when it runs."""
    wanted = f"a whole number, {least} or more"
    if most is not None:
        wanted = f"a whole number from {least} to {most}"
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r:.80}")
    return value


_fraction = functools.partial(_real, least=0, most=1)
_count = functools.partial(_whole, least=1)
_natural = functools.partial(_whole, least=0)
_seed = functools.partial(_whole, least=0, most=2**64 - 1)


def _name(text: str) -> str:
    """A path or a name, which cannot be empty."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text
