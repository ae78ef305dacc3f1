"""``python -m pipelines <step> --config configs/x.yaml [--config more.yaml] [--section.key value]``."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from model.errors import ConfigError, FiftyfoldError, is_out_of_memory
from model.wording import quote
from pipelines.ray_runtime.signals import handle_sigterm

if TYPE_CHECKING:
    from pipelines.steps import Step

STEPS = {
    "demo": "the whole loop with one recipe: prepare, train hybrid and baseline, sweep, evaluate, promote, deploy, ask",
    "prepare": "tokenize text into Parquet shards, with retrieval documents mixed in",
    "train": "train one model under Ray Train",
    "sweep": "search cache settings with Ray Tune",
    "evaluate": "score a checkpoint on long-context tasks with lm-eval",
    "ablate": "the recipe without each of its five choices, over several seeds (ablate --help)",
    "compare": "the hybrid against GQA, DeepSeek-V3.2, Mamba-2 and Kimi Linear (compare --help)",
    "report": "one HTML file with the figures of ablate, compare and sweep",
    "promote": "register the best evaluated run as a model version",
    "deploy": "serve a registered model over an OpenAI-style HTTP API on Ray Serve",
    "export": "convert a checkpoint to or from transformers and the released format, or to GGUF (export --help)",
    "budget": "cache bytes, FLOPs and parameters of a model beside its references (budget --help)",
}
"""Summary of each step. ``pipelines/steps/<name>.py`` defines it."""
USER_ERROR, INTERRUPTED = 2, 130
_MAX_CHARACTERS = 500
"""Maximum length of an error of argparse."""


class Invocation(NamedTuple):
    """A parsed command line."""

    step: str
    files: list[Path]
    overrides: list[str]
    """``key=value`` pairs."""
    print_config: bool
    """Print the merged recipe and stop."""
    options: argparse.Namespace
    """The step's own options."""


def load_step(name: str) -> Step:
    """Import the step ``name``."""
    return importlib.import_module(f"pipelines.steps.{name}").STEP


def parse(arguments: list[str]) -> Invocation:
    """Parse a command line. Options of a single step are known only after its name. Raises ConfigError."""
    from pipelines.recipe.paths import path_option

    arguments, overrides = _split_overrides(arguments)
    parser = _Parser(
        prog="python -m pipelines",
        usage="%(prog)s <step> --config FILE [--config FILE] [--section.key value ...]",
        description="Any setting of the recipe can be given as --section.key value; --print-config shows them all.",
        epilog="steps:\n" + "\n".join(f"  {name:<10}{text}" for name, text in STEPS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("step", choices=STEPS, metavar="step")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        type=path_option("--config"),
        help="a recipe; later files win",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the merged recipe, without the password of tracking.uri, and stop",
    )
    if arguments and arguments[0] in STEPS:
        load_step(arguments[0]).add_options(parser)
    known, rest = parser.parse_known_args(arguments)
    if rest:
        raise ConfigError(f"command line: {quote(rest[0])} is neither an option nor --section.key value")
    options: dict[str, Any] = vars(known)
    step, files, print_config = (options.pop(name) for name in ("step", "config", "print_config"))
    return Invocation(step, files, overrides, print_config, argparse.Namespace(**options))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        shown = message if len(message) <= _MAX_CHARACTERS else f"{message[:_MAX_CHARACTERS]}..."  # quotes arguments
        raise ConfigError(f"command line: {shown} (see --help)")


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the other arguments and the settings as ``key=value``. argparse would interpret some of their values."""
    others, overrides = [], []
    items = iter(arguments)
    for item in items:
        key, equals, value = item[2:].partition("=")
        if not item.startswith("--") or "." not in key:
            others.append(item)
            continue
        if not equals:
            following = next(items, None)
            if following is None:
                raise ConfigError(f"command line: --{key} has no value")
            value = following
        overrides.append(f"{key}={value}")
    return others, overrides


def main(arguments: list[str]) -> int:
    """Run a step; return the exit status."""
    name, resumes = "command line", False
    try:
        _check_imports()
        name, files, overrides, print_config, options = parse(arguments)
        step = load_step(name)
        resumes = step.resumes
        recipe = step.load(options, files, overrides)
        if print_config:
            from pipelines.recipe.yaml_format import dump_yaml

            print(dump_yaml(recipe.to_public_dict()), end="")
            return 0
        step.run(recipe, **vars(options))
    except FiftyfoldError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:  # the system's Python instead of that of .venv
        return _fail(
            f"{sys.executable} has no package '{error.name}'; run `make .venv` and `source .venv/bin/activate`"
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would fail, too
        return USER_ERROR
    except OSError as error:
        return _fail(f"{error.filename or name}: {error.strerror or error}")
    except KeyboardInterrupt:
        print(f"interrupted{'; run the same command again to continue' if resumes else ''}", file=sys.stderr)
        return INTERRUPTED
    except RecursionError:
        return _fail(f"{name}: an input file is nested too deeply")
    except Exception as error:
        if is_out_of_memory(error):
            return _fail(f"{name}: not enough memory for these settings")
        mlflow = sys.modules.get("mlflow.exceptions")
        if mlflow is None or not isinstance(error, mlflow.MlflowException):
            raise
        return _fail(f"MLflow: {' '.join(str(error).split())}")
    return 0


def _fail(message: str) -> int:
    """Print an error as one line, with unprintable characters of file names escaped and long numbers shortened; return
    the status."""
    message = re.sub(r"(\d{20})\d{60,}(\d{20})", r"\1…\2", message)
    printable = (character if character.isprintable() else repr(character)[1:-1] for character in message)
    print(f"error: {''.join(printable)}", file=sys.stderr)
    return USER_ERROR


def _check_imports() -> None:
    """Raise ConfigError if another distribution named ``kernels`` is installed: one would shadow the other."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("kernels")
    except PackageNotFoundError:
        return
    raise ConfigError(
        "the Python package 'kernels' is installed in this environment and shares its name with a folder "
        "of this project: uninstall it or use a separate environment"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, handle_sigterm)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name or a sample may not fit the terminal's encoding
    sys.exit(main(sys.argv[1:]))
