"""The ``qpool`` command. Owns options and exit codes; what a command does is elsewhere.

Nothing heavy is imported before a command needs it: ``qpool --help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from qpool.training.config import Config
from workers import collector
from workers.errors import QPoolError
from workers.logs import hush_tensorflow

_DEFAULT = Config()


@click.group(
    "qpool",
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(package_name="qpool-sf", prog_name="qpool")
def cli() -> None:
    """A worker pool behind the generators of continuous-variable quantum GANs.

    Start with `qpool train`: it trains a small quantum GAN on real data through the pool, in
    half a minute on two cores, and leaves a run directory with pictures.
    """
    hush_tensorflow()


@cli.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="TOML file with settings by these names (steps = 1000); options go over it.",
)
@click.option(
    "--data",
    default=_DEFAULT.data,
    help="breast-cancer, iris, wine, ring, four-gaussians, or a .csv or .npy file of rows.",
)
@click.option("--steps", default=_DEFAULT.steps, help="Training steps, of a batch each.")
@click.option("--batch-size", default=_DEFAULT.batch_size, help="Samples in a step.")
@click.option("--layers", default=_DEFAULT.layers, help="Layers of the quantum network.")
@click.option("--cutoff", default=_DEFAULT.cutoff, help="Fock states kept per mode.")
@click.option("--encoding", default=_DEFAULT.encoding, help="How latent vectors enter.")
@click.option("--readout", default=_DEFAULT.readout, help="What a sample is: positions, homodyne.")
@click.option("--loss", default=_DEFAULT.loss, help="wasserstein or non-saturating.")
@click.option("--generator-rate", default=_DEFAULT.generator_rate, help="Its learning rate.")
@click.option("--critic-rate", default=_DEFAULT.critic_rate, help="Its learning rate.")
@click.option("--schedule", default=_DEFAULT.schedule, help="Of both rates: constant or cosine.")
@click.option("--critic-steps", default=_DEFAULT.critic_steps, help="Critic updates in a step.")
@click.option("--critic-units", default=_DEFAULT.critic_units, help="In each hidden layer of it.")
@click.option("--critic-layers", default=_DEFAULT.critic_layers, help="Its hidden layers.")
@click.option("--penalty", default=_DEFAULT.penalty, help="Weight of the gradient penalty.")
@click.option("--norm-penalty", default=_DEFAULT.norm_penalty, help="Weight on leaving the cutoff.")
@click.option(
    "--ema-momentum",
    type=float,
    help="Of an average of the generator's weights, which is what is evaluated and sampled; try "
    "0.998.  [default: none]",
)
@click.option("--clip-norm", type=float, help="Largest norm of a gradient.  [default: none]")
@click.option("--workers", type=int, help="Worker processes.  [default: physical cores]")
@click.option("--threads", default=_DEFAULT.threads, help="Cores of each worker.")
@click.option(
    "--strategy",
    default=_DEFAULT.strategy,
    help="processes, threads, cpu_batch, sequential, ray; auto: the fastest here, measured first.",
)
@click.option("--address", help="Of a Ray cluster, for --strategy ray.  [default: RAY_ADDRESS]")
@click.option("--tile", type=int, help="Rows computed at once.  [default: from the model]")
@click.option("--start-method", help="forkserver or spawn.  [default: the system's best]")
@click.option("--checkpoint-every", default=_DEFAULT.checkpoint_every, help="Steps between them.")
@click.option("--evaluate-every", default=_DEFAULT.evaluate_every, help="Steps between them.")
@click.option("--keep", default=_DEFAULT.keep, help="Checkpoints kept, beside the best.")
@click.option("--seed", default=_DEFAULT.seed, help="Of weights, latent draws and shuffling.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/DATE]")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.pass_context
def train(
    context: click.Context,
    config_file: Path | None,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a small quantum GAN on two-dimensional data, through the pool.

    Ctrl-C and SIGTERM end it after the step under way, with a checkpoint; `qpool resume` goes on.
    """
    from qpool.training import run

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    settings = Config.read(config_file) if config_file else {}
    given = click.core.ParameterSource.COMMANDLINE
    settings |= {n: v for n, v in options.items() if context.get_parameter_source(n) is given}
    _end_of_run(run.train(Config.of(settings), out or run.default_directory()), as_json)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--workers", type=int, help="Worker processes.  [default: physical cores]")
@click.option("--start-method", help="forkserver or spawn.  [default: as before]")
@click.option("--strategy", help="processes or ray.  [default: as the run was begun]")
@click.option("--address", help="Of a Ray cluster to go on with, this time.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def resume(directory: Path, as_json: bool, **options: Any) -> None:
    """Go on with the run in DIRECTORY from its newest checkpoint.

    It ends with the same bits as a run that was never interrupted, also with another number of
    workers, and on a Ray cluster in place of this machine or the other way round.
    """
    from qpool.training import run

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _end_of_run(run.resume(directory, **options), as_json)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--count", default=1000, help="How many samples.")
@click.option("--checkpoint", default="newest", help="newest, best, or a checkpoint file.")
@click.option("--seed", default=0, help="Of the latent draws.")
@click.option("--out", type=click.Path(path_type=Path), help="CSV file.  [default: to the screen]")
@click.option("--json", "as_json", is_flag=True, help="Print the samples as JSON.")
def sample(
    directory: Path, count: int, checkpoint: str, seed: int, out: Path | None, as_json: bool
) -> None:
    """Draw samples from the generator of the run in DIRECTORY, in the data's own units."""
    from qpool.training import run

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    rows, columns = run.sample(directory, count, checkpoint=checkpoint, seed=seed)
    if as_json:
        click.echo(json.dumps({"columns": columns, "rows": rows.tolist()}))
        return
    lines = [",".join(f'"{name}"' if "," in name else name for name in columns)]
    lines += [",".join(repr(float(value)) for value in row) for row in rows]
    if out is None:
        click.echo("\n".join(lines))
    else:
        out.write_text("\n".join(lines) + "\n")
        click.echo(f"{count} samples are in {out}")


@cli.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    required=True,
    help="TOML file: settings of `qpool train`, then [grid] with a list for each that varies.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Its directory.")
@click.option("--cores", type=int, help="Cores to use.  [default: all physical ones]")
@click.option("--together", type=int, help="Runs side by side at most.  [default: one a core]")
@click.option("--retry", is_flag=True, help="Run those again that failed, diverged or were pruned.")
@click.option("--timeout", type=float, help="Seconds a run may say nothing.  [default: 600]")
@click.option("--start-method", help="forkserver or spawn.  [default: the system's best]")
@click.option("--strategy", help="ray: place runs on the nodes of a Ray cluster.")
@click.option("--address", help="Of that cluster.  [default: RAY_ADDRESS, or this machine]")
@click.option("--json", "as_json", is_flag=True, help="Print what came of it as JSON.")
def campaign(config_file: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Train many times at once: a grid of settings, as many runs side by side as there are cores.

    \b
        steps = 2000                      # campaign.toml: settings of all runs
        cutoff = 8
        [grid]                            # every combination is a run
        data = ["iris", "wine"]
        seed = [1, 2, 3, 4]
        [[cells]]                         # optional: settings that go together
        layers = 2
        generator_rate = 0.01
        [search]                          # optional: settings drawn at random
        critic_rate = {low = 1e-4, high = 1e-2, log = true}
        [campaign]                        # optional
        trials = 20                       # of the search, each over the grid
        halving = {first = 500, factor = 3}     # ends hopeless runs early

    Each run has a directory OUT/runs/NAME that `qpool resume` and `qpool sample` work on; what came
    of all is in OUT/results.csv and OUT/report.html. Ctrl-C ends it with a checkpoint of each run;
    the same command goes on. The exit code is 1 if a run failed.
    """
    from qpool.training import Campaign

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    options["retry"] = options["retry"] or None
    summary = Campaign.read(config_file, out=out, **options).run()
    lost = summary["failed"] + summary["diverged"]
    if as_json:
        click.echo(json.dumps(summary))
    elif "stopped" in summary:
        click.echo(
            f"stopped by {summary['stopped']}, {summary['finished']} of {len(summary['runs'])} "
            "runs finished; the same command goes on"
        )
    else:
        click.echo(
            f"{summary['finished']} of {len(summary['runs'])} runs finished; read "
            f"{Path(summary['directory']) / 'report.html'}"
        )
        if lost:
            click.echo(
                f"{lost} failed or diverged, with what they said in "
                f"{Path(summary['directory']) / 'logs'}; --retry runs them again"
            )
    if "stopped" in summary:
        sys.exit({"SIGINT": 130, "SIGTERM": 143}[summary["stopped"]])
    if lost:
        sys.exit(1)


def _end_of_run(summary: dict[str, Any], as_json: bool) -> None:
    from qpool.training import run

    directory = Path(summary["directory"])
    if as_json:
        click.echo(json.dumps(summary))
    elif "stopped" in summary:
        click.echo(
            f"stopped by {summary['stopped']} after step {summary['steps']}, with a checkpoint; go "
            f"on with: qpool resume {directory}"
        )
    else:
        click.echo(run.sentence(summary))
        click.echo(f"the run is in {directory}; look at {directory / 'samples.png'}")
    if "stopped" in summary:
        sys.exit({"SIGINT": 130, "SIGTERM": 143}[summary["stopped"]])


@cli.command()
@click.argument("cases", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON lines.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for the results, as CASE.json, and for pictures.",
)
def bench(cases: tuple[str, ...], as_json: bool, out: Path | None) -> None:
    """Run benchmark CASES (default: those of the pool and of the engine).

    Of the pool: speedup, roundtrip, monitor (what watching costs). Of the engine, each against
    stock Strawberry Fields in the same run: engine (with Piquasso, where it is installed), wide,
    pooled, loop, memory, accuracy; and roofline (what bounds a step on one core; with --out, a
    picture). These take a minute or a few each.

    By their names only: strategies (every one, and threads, joblib and Ray with stock Strawberry
    Fields), auto (what it chooses, against each fixed one), utilisation (how busy all cores are,
    for a minute), forms (an engine held or made in the call, a loop over the batch), first (whole
    programs, cold: 10, 60 and 600 steps by each strategy), models (50 one after another: what stays
    of each), campaign (runs side by side, and one after another), scaling (the scaling model, on
    tiles of known cost), coordinator (its own part of a step, for up to 256 workers, which are
    simulated), trainer (its step, by strategy), ray (a Ray cluster on this machine, against a local
    pool), natural (the natural gradient against plain ones).
    """
    from qpool.studies import bench as benchmarks

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in cases:
        benchmarks.check(name)  # all of them, before the first is run
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for name in cases or benchmarks.USUAL:
        found = benchmarks.run(name)
        if out is not None:
            benchmarks.keep(name, found, out)
        if as_json:
            click.echo(json.dumps(found))
            continue
        click.echo(f"{name}")
        _echo(found, "  ")


class _List(click.ParamType):
    """``1,2,4``: values of one kind, separated by commas."""

    def __init__(self, kind: type) -> None:
        self._kind = kind
        self.name = f"{kind.__name__},..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._kind(part) for part in value.split(",") if part)
        except ValueError:
            self.fail(f"{value!r} is no list of {self._kind.__name__} separated by commas")


def _grid(name: str, default: str, words: str, kind: type = int) -> Any:
    return click.option(f"--{name}", type=_List(kind), default=default, help=words)


@cli.command()
@_grid("workers", "1,2", "Counts of worker processes (or threads).")
@_grid("threads", "1", "Cores of each worker.")
@_grid("batch", "64", "Samples in a step.")
@_grid("tile", "0", "Rows computed at once; 0: from the model.")
@_grid("modes", "2", "Modes of the circuit.")
@_grid("layers", "2", "Its layers.")
@_grid("cutoff", "8", "Fock states kept per mode.")
@_grid("strategy", "processes", "processes, threads, cpu_batch, sequential, ray.", str)
@_grid("engine", "traced", "traced, or stock Strawberry Fields.", str)
@_grid("nodes", "1", "Nodes of a Ray cluster, for strategy ray.")
@click.option("--address", help="Of that cluster.  [default: RAY_ADDRESS, or this machine]")
@click.option("--seconds", default=2.0, help="For which a cell is timed.")
@click.option("--turns", default=3, help="In so many turns.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory.")
@click.option("--json", "as_json", is_flag=True, help="Print all cells as JSON lines.")
def sweep(out: Path, as_json: bool, address: str | None, **grid: Any) -> None:
    """Measure a training step over a grid, and write a report with plots.

    All combinations of the lists are measured, each line in OUT/cells.csv as soon as it is known.
    The same command goes on with a sweep that was stopped. OUT/report.html can be read alone; it
    has what was measured, and what a scaling model predicts for more workers.
    """
    from qpool.studies import report
    from qpool.studies import sweep as sweeps

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    rows = sweeps.sweep(sweeps.Grid(**grid), out, lambda line: click.echo(line, err=True), address)
    page = report.write(out)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    click.echo(f"{len(rows)} cells are in {out / 'cells.csv'}; read {page}")


@cli.command()
@click.option(
    "--workers", type=click.IntRange(1), help="Of the parallel step.  [default: at most two]"
)
@click.option("--address", help="Of a Ray cluster to look at too.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON lines.")
def doctor(workers: int | None, address: str | None, as_json: bool) -> None:
    """Look at this machine, and try whether qpool works on it.

    Prints what matters to a pool (cores, quota, NUMA, frequency, memory), with advice, and checks
    Strawberry Fields, the traced engine and a small parallel step. The exit code is 1 if something
    is wrong; advice alone leaves it 0.
    """
    import dataclasses

    from qpool.measure.doctor import examine

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    marks = {"ok": ("ok", "green"), "advice": ("slow", "yellow"), "wrong": ("WRONG", "red")}
    wrong = False
    for finding in examine(workers, address):
        wrong |= finding.status == "wrong"
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(finding)))
            continue
        mark, colour = marks[finding.status]
        name = finding.name.ljust(_NAME_WIDTH)
        click.echo(f"{click.style(mark.ljust(5), fg=colour)}  {name}  {finding.value}")
        if finding.advice:
            click.echo(f"{'':7}{'':{_NAME_WIDTH}}  -> {finding.advice}")
    if wrong:
        sys.exit(1)


#: Of a finding's name, in a terminal.
_NAME_WIDTH = 22


def _echo(found: dict[str, Any], indent: str) -> None:
    for key, value in found.items():
        if isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
            click.echo(f"{indent}{key}:")
            _echo(value, indent + "  ")
        elif isinstance(value, dict):
            figures = "  ".join(f"{k} {_figure(v)}" for k, v in value.items())
            click.echo(f"{indent}{key}: {figures}")
        elif key != "case" and not isinstance(value, list):
            click.echo(
                f"{indent}{key}: {value:.4g}"
                if isinstance(value, float)
                else f"{indent}{key}: {value}"
            )


def _figure(value: Any) -> str:
    """A number; of a list, which pictures show, how it begins and ends."""
    if isinstance(value, list):
        return " ... ".join(_figure(v) for v in (value[0], value[-1])) if value else "-"
    return value if isinstance(value, str) else f"{value:.4g}"


def run(command: click.Command) -> None:
    """Run a command: an expected error is one message and exit code 1, Ctrl-C is 130."""
    collector.relax()
    try:
        command.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except QPoolError as error:
        click.echo(f"{command.name}: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        click.echo(f"{command.name}: {error.filename}: {error.strerror}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"{command.name}: interrupted", err=True)
        sys.exit(130)


def main() -> None:
    """Entry point."""
    run(cli)
