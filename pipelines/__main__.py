"""``python -m pipelines <step> --config configs/x.yaml [--config more.yaml] [--section.key value]``."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys

from model.errors import ConfigError, FiftyfoldError
from pipelines.ray_runtime.signals import on_sigterm

STEPS = {
    "demo": "the whole loop with one recipe: prepare, sweep, train, baseline, evaluate, promote, deploy, ask",
    "prepare": "text to Parquet token shards, with retrieval documents mixed in",
    "train": "train one model under Ray Train",
    "sweep": "search cache settings with Ray Tune",
    "evaluate": "score a checkpoint on long-context tasks with lm-eval",
    "compare": "what quantisation in the training loop buys over quantising after the fact",
    "promote": "register the best evaluated run as a model version",
    "deploy": "answer OpenAI-style HTTP requests with a registered model on Ray Serve",
    "export": "carry a checkpoint over to or from transformers and the released format (export --help)",
    "budget": "cache bytes, FLOPs and parameters of a model beside its references (budget --help)",
}
OWN_OPTIONS = {"budget", "export"}
"""Steps with options of their own. Their module defines ``add_options(parser)``, ``load(options, files, overrides)``,
which reads the recipe, and ``run(recipe, options)``."""
USER_ERROR, INTERRUPTED = 2, 130


def parse(arguments: list[str]) -> tuple[str, list[str], list[str], bool]:
    """(step, config files, ``key=value`` overrides, whether to print the recipe and stop)."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines",
        usage="%(prog)s <step> --config FILE [--config FILE] [--section.key value ...]",
        description="Any setting of the recipe can be given as --section.key value; --print-config shows them all.",
        epilog="steps:\n" + "\n".join(f"  {name:<10}{text}" for name, text in STEPS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("step", choices=STEPS, metavar="step")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="a recipe; later ones win")
    parser.add_argument("--print-config", action="store_true", help="print the merged recipe and stop")
    known, rest = parser.parse_known_args(arguments)
    return known.step, known.config, _overrides(rest), known.print_config


def own_options(arguments: list[str]) -> tuple[argparse.Namespace | None, list[str]]:
    """The options that the step declares for itself, and the arguments that are left; None where it has none."""
    if not arguments or arguments[0] not in OWN_OPTIONS:
        return None, arguments
    step = arguments[0]
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines {step}",
        usage="%(prog)s [options] [--config FILE] [--section.key value ...]",
        description=STEPS[step],
        allow_abbrev=False,
    )
    importlib.import_module(f"pipelines.steps.{step}").add_options(parser)
    options, rest = parser.parse_known_args(arguments[1:])
    return options, [step, *rest]


def _overrides(rest: list[str]) -> list[str]:
    pairs = []
    items = iter(rest)
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
    try:
        _check_imports()
        options, arguments = own_options(arguments)
        step, files, overrides, print_config = parse(arguments)
        from pipelines.recipe.schema import load_recipe

        module = importlib.import_module(f"pipelines.steps.{step}") if options is not None else None
        recipe = load_recipe(files, overrides) if module is None else module.load(options, files, overrides)
        if print_config:
            import yaml

            print(yaml.safe_dump(recipe.to_dict(), sort_keys=False), end="")
            return 0
        if module is not None:
            module.run(recipe, options)
        else:
            importlib.import_module(f"pipelines.steps.{step}").run(recipe)
    except FiftyfoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"error: {error.filename or step}: {error.strerror or error}", file=sys.stderr)
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
    """Another distribution named ``kernels`` in the same environment would shadow ours, or be shadowed by it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("kernels")
    except PackageNotFoundError:
        return
    raise ConfigError(
        "the Python package 'kernels' is installed in this environment and shares its name with a folder "
        "of this project: uninstall it, or use an environment of its own"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, on_sigterm)
    sys.exit(main(sys.argv[1:]))
