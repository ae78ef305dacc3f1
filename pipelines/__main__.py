"""``python -m pipelines <step> --config configs/x.yaml [--config more.yaml] [--section.key value]``."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from model.errors import ConfigError, FiftyfoldError
from pipelines.ray_runtime.signals import handle_sigterm

if TYPE_CHECKING:
    from pipelines.steps import Step

STEPS = {
    "demo": "the whole loop with one recipe: prepare, sweep, train, baseline, evaluate, promote, deploy, ask",
    "prepare": "tokenize text into Parquet shards, with retrieval documents mixed in",
    "train": "train one model under Ray Train",
    "sweep": "search cache settings with Ray Tune",
    "evaluate": "score a checkpoint on long-context tasks with lm-eval",
    "compare": "quantization-aware training against post-training quantization",
    "promote": "register the best evaluated run as a model version",
    "deploy": "serve a registered model over an OpenAI-style HTTP API on Ray Serve",
    "export": "convert a checkpoint to or from transformers, the released format or GGUF (export --help)",
    "budget": "cache bytes, FLOPs and parameters of a model beside its references (budget --help)",
}
"""Summary of each step. ``pipelines/steps/<name>.py`` defines it."""
USER_ERROR, INTERRUPTED = 2, 130


class Invocation(NamedTuple):
    """A parsed command line."""

    step: str
    files: list[str]
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
    """Parse a command line. Options of a step's own are known where the step comes first."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines",
        usage="%(prog)s <step> --config FILE [--config FILE] [--section.key value ...]",
        description="Any setting of the recipe can be given as --section.key value; --print-config shows them all.",
        epilog="steps:\n" + "\n".join(f"  {name:<10}{text}" for name, text in STEPS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("step", choices=STEPS, metavar="step")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="a recipe; later files win")
    parser.add_argument("--print-config", action="store_true", help="print the merged recipe and stop")
    if arguments and arguments[0] in STEPS:
        load_step(arguments[0]).add_options(parser)
    known, rest = parser.parse_known_args(arguments)
    options: dict[str, Any] = vars(known)
    step, files, print_config = (options.pop(name) for name in ("step", "config", "print_config"))
    return Invocation(step, files, _parse_overrides(rest), print_config, argparse.Namespace(**options))


def _parse_overrides(arguments: list[str]) -> list[str]:
    pairs = []
    items = iter(arguments)
    for item in items:
        if not item.startswith("--") or "." not in item:
            raise ConfigError(f"command line: '{item}' is neither an option nor --section.key value")
        key, equals, value = item[2:].partition("=")
        if not equals:
            following = next(items, None)
            if following is None:
                raise ConfigError(f"command line: --{key} has no value")
            value = following
        pairs.append(f"{key}={value}")
    return pairs


def main(arguments: list[str]) -> int:
    """Run a step; return the exit status."""
    name = "command line"
    try:
        _check_imports()
        name, files, overrides, print_config, options = parse(arguments)
        step = load_step(name)
        recipe = step.load(options, files, overrides)
        if print_config:
            import yaml

            print(yaml.safe_dump(recipe.to_dict(), sort_keys=False), end="")
            return 0
        step.run(recipe, **vars(options))
    except FiftyfoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"error: {error.filename or name}: {error.strerror or error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        mlflow = sys.modules.get("mlflow.exceptions")
        if mlflow is None or not isinstance(error, mlflow.MlflowException):
            raise
        print(f"error: MLflow: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    return 0


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
    sys.exit(main(sys.argv[1:]))
