"""The command line: argv to calls, errors to exit status. Nothing heavy is imported before a recipe has been read."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_fasttrain.before_torch import limit_spinning
from hf_fasttrain.errors import DataError, NotEnoughMemory, RunError, Stopped, UserError, nearest, without_secrets
from hf_fasttrain.shipped import recipe_header, shipped_recipes

if TYPE_CHECKING:
    from rich.console import Console

    from hf_fasttrain.recipe import Recipe
    from hf_fasttrain.trainer import Trainer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train an image classifier from one recipe file: `hf-fasttrain RECIPE [section.key=value ...]`, "
    "or `accelerate launch -m hf_fasttrain RECIPE [section.key=value ...]`.",
)
recipes_app = typer.Typer(
    help="List the shipped recipes, or copy one.", invoke_without_command=True, rich_markup_mode=None
)
app.add_typer(recipes_app, name="recipes")
cache_app = typer.Typer(
    help="List the decoded pixels kept on disk (data.cache), or delete them.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
app.add_typer(cache_app, name="cache")

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, the name of a shipped recipe, or hf://OWNER/NAME.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, such as train.batch_size=64")]
RunArgument = Annotated[Path, typer.Argument(help="A run folder.")]
WeightsOption = Annotated[
    str | None, typer.Option(help="last, best or step_N of a checkpoint that is kept; by default those in RUN/model.")
]
PushedRunArgument = Annotated[str, typer.Argument(help="A run folder, or hf://OWNER/NAME.")]


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exit status 0; 2 for a user's mistake; 74 if a result could not be written; 75 for a run that was stopped by a
    signal and is saved, or whose loader processes died after it had saved something, else 1; 130 for Ctrl-C.
    """
    limit_spinning()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _out_of_memory_told():
            app(_with_verb(arguments), prog_name="hf-fasttrain", standalone_mode=True)
    except UserError as error:
        if _is_main() or not error.every_process:
            print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        sys.exit(error.status)


@contextlib.contextmanager
def _out_of_memory_told() -> Iterator[None]:
    """Make one message of memory that ran out, whatever was being done."""
    try:
        yield
    except MemoryError as error:
        what = next(iter(str(error).splitlines()), "")
        short = RunError(
            f"out of memory{f': {what}' if what else ''}; end other programs, or use a smaller model or image"
        )
        short.every_process = False
        raise short from None


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _with_verb(arguments: list[str]) -> list[str]:
    """Put `train` before a recipe that stands where a verb could."""
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    verbs |= {"recipes", "cache"}
    if not arguments or arguments[0] in verbs or arguments[0] in ("--help", "-h"):
        return ["--help"] if arguments[:1] == ["-h"] else arguments
    first = next((argument for argument in arguments if not argument.startswith("-")), "")
    known = first.endswith((".yaml", ".yml")) or first.startswith("hf://") or first in shipped_recipes()
    if first and not known and not Path(first).exists():
        hint = nearest(first, [*verbs, *shipped_recipes()])
        raise UserError(
            f"'{first}' is no recipe and no command.{hint} Commands: {', '.join(sorted(verbs))}; "
            f"recipes: a .yaml file, hf://OWNER/NAME, or one of {', '.join(shipped_recipes())}"
        )
    return ["train", *arguments]


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
) -> None:
    """Train, evaluate and save the recipe's classifier (the default command)."""
    from hf_fasttrain.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [])  # before anything heavy is imported
    from hf_fasttrain.build import build_trainer
    from hf_fasttrain.launch import output_dir
    from hf_fasttrain.publish.owed import owed, what_is_lost
    from hf_fasttrain.runfolder import require_free
    from hf_fasttrain.stop import ignore_signals

    folder = Path(output_dir(loaded))
    require_free(folder, resume=resume)
    trainer = build_trainer(loaded, resume=resume)
    if resume and trainer.is_finished:
        missing = owed(folder, trainer.state.step, trainer.final_step, report=trainer.report)
        if not missing:
            _say_finished(trainer, folder)
            return
        trainer.log.say(f"{folder}: trained to the end; now making what is missing: {', '.join(missing)}")
    else:
        started = f"{trainer.num_steps:,} steps on {trainer.device}, run folder {folder}"
        trainer.log.say(f"training {loaded.model.name} on {loaded.data.dataset}: {started}")
    try:
        with _memory_limit(trainer):
            result = trainer.fit()
    except Stopped as stopped:
        ignore_signals(int(stopped.code or 0))
        _end_trackers(trainer)
        raise
    _end_trackers(trainer)
    if result.not_written:
        steps = trainer.state.step, trainer.final_step
        trainer.log.say(what_is_lost(folder, result.not_written, *steps, report=trainer.report))
        sys.exit(Stopped.NOT_WRITTEN)
    _say_what_next(trainer.log.say, folder, loaded, result)


def _say_finished(trainer: Trainer, folder: Path) -> None:
    """Say that there is nothing to train or to write, and how a push that is owed is made."""
    from hf_fasttrain.early_stopping import HOW_TO_GO_ON
    from hf_fasttrain.publish.owed import is_pushed

    steps, pusher = trainer.state.step, getattr(trainer.publisher, "pusher", None)
    early = f"\n{trainer.early_stop}; {HOW_TO_GO_ON}" if trainer.early_stop else ""
    trainer.log.say(f"{folder}: this run is finished ({steps} steps); nothing to do{early}")
    if pusher is not None and not is_pushed(folder, pusher.wish.repo, steps):
        trainer.log.say(f"not pushed to {pusher.wish.repo} yet: {pusher.wish.command(folder)}")


@contextlib.contextmanager
def _memory_limit(trainer: Trainer) -> Iterator[None]:
    """Let training on a CPU take what is free now and no more: what does not fit fails here instead of being killed.

    Out of memory where no step can be made again, as in a checkpoint's copy, is one message.
    """
    from hf_fasttrain.environment import free_memory_bytes
    from hf_fasttrain.out_of_memory import is_out_of_memory, what_failed
    from hf_fasttrain.process_memory import limited_memory
    from hf_fasttrain.threads import local_processes

    free = free_memory_bytes()
    room = (free - trainer.reserved_memory - max(64 << 20, free // 50)) // local_processes()
    try:
        with limited_memory(room) if trainer.device.type == "cpu" else contextlib.nullcontext():
            yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemory(
            f"out of memory after step {trainer.state.step} ({what_failed(error)}); the same command with --resume "
            "goes on from the newest checkpoint; lower accelerate.micro_batch_size, evaluate.batch_size or data.workers"
        ) from None


def _end_trackers(trainer: Trainer) -> None:
    try:
        trainer.accelerator.end_training()
    except Exception as error:  # noqa: BLE001 - others' code; the run itself has ended well
        trainer.log.say(f"note: a tracker could not be ended: {error}")


def _say_what_next(say: Any, folder: Path, recipe: Recipe, result: Any) -> None:
    from hf_fasttrain.early_stopping import HOW_TO_GO_ON, EarlyStop
    from hf_fasttrain.final import which_weights

    early = f"      {EarlyStop(**result.early_stopping)}\n      {HOW_TO_GO_ON}\n" if result.early_stopping else ""
    metrics = result.test_metrics or result.metrics
    score = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    page = folder / "report.html"
    own = [text for text in recipe.source.overrides if text.startswith("model.")]
    report = f"  {page}    curves, classes, mistakes; opens in a browser\n" if page.exists() else ""
    say(
        f"done: {result.steps:,} steps, {result.images:,} images in {result.train_seconds:.1f} s "
        f"({result.images_per_second:,.0f} images/s, {result.data_wait_fraction:.0%} waiting for data)\n"
        f"      {score}\n"
        f"{early}"
        f"  {folder}/model          the classifier: {which_weights(folder, result)}\n"
        f"  {folder}/result.json    figures; metrics.jsonl: their course; resolved.yaml: every setting\n"
        f"{report}"
        f"  {folder}/checkpoints    to go on from: the same command with --resume and a longer train.duration\n"
        f"try next:\n"
        f"  hf-fasttrain predict {folder} IMAGE...\n"
        f"  hf-fasttrain evaluate {folder}\n"
        f"  hf-fasttrain export {folder} --onnx\n"
        f"  hf-fasttrain train {shlex.join([recipe.source.name, *own])} data.dataset=FOLDER output_dir=runs/mine"
    )


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    images: Annotated[
        bool,
        typer.Option("--images", help="Decode every image first: corrupt files, class balance, duplicates, sizes."),
    ] = False,
    list_file: Annotated[
        Path | None, typer.Option("--list", help="With --images: file to write all corrupt images to, as JSON lines.")
    ] = None,
) -> None:
    """Resolve and validate everything, print each value with its origin, train nothing."""
    from hf_fasttrain.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    _require_list_file(list_file, images=images)
    from hf_fasttrain.build import build_parts, build_unwritten
    from hf_fasttrain.launch import output_dir
    from hf_fasttrain.memory_report import memory_table
    from hf_fasttrain.runfolder import held_by_run
    from hf_fasttrain.scan_report import check_images, print_table

    parts = build_parts(loaded)
    build_unwritten(parts, keep_pixels=False)
    console = _wide_console()
    title = f"{recipe}: every value, where it came from, and whether it is learnt or machine"
    rows = [(key, json.dumps(fact.value), fact.origin, fact.tag) for key, fact in parts.settings.all().items()]
    print_table(console, title, ("key", "value", "origin", "tag"), rows)
    print_table(console, *memory_table(parts))
    held = held_by_run(Path(output_dir(loaded)))
    if held:
        parts.settings.note(f"output_dir {output_dir(loaded)} holds a run already; training would be refused")
    for note in [*parts.settings.notes, *parts.settings.weight_notes]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if images:
        check_images(console, loaded, parts.source, list_file)
    console.print(f"{recipe} is right: {parts.order.steps_per_epoch:,} steps per epoch", markup=False)


def _require_list_file(path: Path | None, *, images: bool) -> None:
    """Say what is wrong with --list before every image has been decoded."""
    if path is None:
        return
    if not images:
        raise UserError("--list writes what --images finds; give both")
    if path.exists():
        raise UserError(f"{path} exists already; give another file to write")
    if not path.parent.is_dir():
        raise UserError(f"{path}: can't be written: {path.parent} is no folder")


def _say_on_stderr(text: str) -> None:
    if _is_main():
        print(f"note: {text}", file=sys.stderr)


@app.command()
def evaluate(
    run: PushedRunArgument,
    overrides: Overrides = None,
    split: Annotated[str | None, typer.Option(help="A split of the data set; by default the evaluation split.")] = None,
    weights: WeightsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a run's model on its evaluation split, or on another split or data set."""
    from rich.table import Table
    from rich.text import Text

    from hf_fasttrain.serve import evaluate_run

    measured = evaluate_run(run, overrides or [], split=split, weights=weights, note=_say_on_stderr)
    if not _is_main():
        return
    if as_json:
        print(json.dumps(measured))
    else:
        table = Table("metric", "value")
        for name, value in measured.items():
            table.add_row(Text(name), Text(f"{value:.4f}" if isinstance(value, float) else str(value), overflow="fold"))
        _wide_console().print(table)


@app.command()
def predict(
    run: PushedRunArgument,
    images: Annotated[list[str], typer.Argument(help="Image files and folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    weights: WeightsOption = None,
    device: Annotated[str, typer.Option(help="auto: a GPU if there is one; cpu, cuda, cuda:1.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Name the most likely classes of image files and folders."""
    from rich.table import Table
    from rich.text import Text

    from hf_fasttrain.serve import predict_images

    bad: list[str] = []
    predictions = predict_images(run, images, top=top, weights=weights, device=device, bad=bad.append)
    if as_json:
        print(json.dumps(predictions, indent=2))
    elif predictions:
        table = Table("image", "class", "score")
        for row in predictions:
            for number, guess in enumerate(row["classes"]):
                table.add_row(*map(Text, ("" if number else row["image"], guess["class"], f"{guess['score']:.4f}")))
        _wide_console().print(table)
    if bad:
        raise DataError("\n  ".join([f"{len(bad)} of {len(bad) + len(predictions)} images left out:", *bad]))


@app.command()
def push(
    run: RunArgument,
    repo: Annotated[str | None, typer.Argument(help="OWNER/NAME on the Hub; by default the recipe's hub.repo.")] = None,
    private: Annotated[bool | None, typer.Option("--private", help="Make a new repository private.")] = None,
    license: Annotated[str | None, typer.Option(help="Of the model, for its card: apache-2.0, mit, ...")] = None,
    weights: WeightsOption = None,
) -> None:
    """Upload a finished run to a Hub repository: model, card, recipe and figures in one commit."""
    from hf_fasttrain.publish.hub import asked_hub, push_run

    asked = asked_hub(run)
    name = repo or asked.get("repo")
    if not name:
        raise UserError(f"{run}: its recipe has no hub.repo; say where to: hf-fasttrain push {run} OWNER/NAME")
    if name == asked.get("repo"):
        private = asked.get("private") if private is None else private
        license = license or asked.get("license")
        weights = weights or ("best" if asked.get("every") == "best" else None)
    print(push_run(run, name, private=private, license=license, weights=weights, tell=_say_on_stderr))


@app.command()
def export(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="Folder to write; by default the run's own model folder.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write model.onnx, checked in onnxruntime.")] = False,
    weights: WeightsOption = None,
) -> None:
    """Write a finished run's model for other tools: timm, transformers, onnxruntime."""
    from hf_fasttrain.publish.export import export_run

    exported = export_run(run, output, onnx=onnx, weights=weights)
    print(f"{exported.folder}: opened by {', '.join(exported.forms)}")
    for note in exported.notes:
        print(f"note: {note}")
    if exported.onnx_difference is not None:
        print(f"model.onnx: logits differ by at most {exported.onnx_difference:.1e} in onnxruntime")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are laid over each other.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; by default RUN/report.html, for several report.html.")
    ] = None,
) -> None:
    """Write a page about one run or several that opens offline: curves, classes, mistakes, settings."""
    from hf_fasttrain.publish.report import write_report

    print(write_report(runs, output))


TechniqueNames = Annotated[str | None, typer.Option(metavar="NAME,NAME", help="Techniques, by their names.")]


@app.command()
def ablate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each arm; from 6 on, intervals of 95 % or more.")] = 6,
    seconds: Annotated[float, typer.Option(min=0.0, help="Least length of a turn.")] = 2.0,
    only: TechniqueNames = None,
    without: TechniqueNames = None,
    full: Annotated[bool, typer.Option("--full", help="Then train every arm to the end.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="With --full: trainings of each arm.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder to write; by default a new one in ablations/.")] = None,
) -> None:
    """Measure what each technique (accumulation, mixed precision, pinned memory, ...) is worth here."""
    from hf_fasttrain.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from hf_fasttrain.study import ablate as study
    from hf_fasttrain.study.ablation_files import print_ablation, write_ablation
    from hf_fasttrain.study.full import train_all

    folder, console = output or study.default_folder(loaded), _wide_console()
    plan = study.Plan(rounds, seconds, _names(only), _names(without))
    ablation = study.earlier(folder, loaded) if full else None
    whole = True
    if ablation is None:
        study.require_new(folder)
        with _ended_by_ctrl_c():  # before there is anything to keep
            ablation, whole = study.ablate(loaded, plan, command=_command_line(), tell=_say_on_stderr)
        write_ablation(ablation, folder)
    if full and whole:
        with _ended_by_ctrl_c():
            ablation, whole = train_all(ablation, recipe, folder, seeds, _say_on_stderr)
            write_ablation(ablation, folder)
    print_ablation(console, ablation)
    console.print(f"{folder}: ablation.json, .md, .png, .svg, .html", markup=False)
    if not whole:
        sys.exit(Stopped.CTRL_C)
    if full and not any(row.full for row in ablation.rows):
        raise UserError(f"no training came to its end; {folder}/runs/*.log say why")


@app.command()
def tune(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    budget: Annotated[str, typer.Option(help="How long it may take: 3m, 90s, 1h.")] = "3m",
    output: Annotated[Path | None, typer.Option(help="Recipe to write; by default the name with .tuned.yaml.")] = None,
    store: Annotated[bool, typer.Option(help="Keep it for `auto` values on this machine.")] = True,
) -> None:
    """Find the fastest machine settings for a recipe here, and write them down as a recipe."""
    from hf_fasttrain.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from hf_fasttrain.study.techniques import hardware
    from hf_fasttrain.study.tune import parse_budget
    from hf_fasttrain.study.tune import tune as search
    from hf_fasttrain.study.tuned_recipe import default_path, print_found, require_new_file, write_tuned

    path, seconds = output or default_path(loaded), parse_budget(budget)
    require_new_file(path)
    with _ended_by_ctrl_c():  # before there is anything to keep
        found = search(loaded, seconds, hardware(), tell=_say_on_stderr)
    for trouble in write_tuned(loaded, found, path, command=_command_line(), store=store):
        _say_on_stderr(trouble)
    print_found(_wide_console(), found, path)
    if not found.whole:
        sys.exit(Stopped.CTRL_C)


@app.command()
def doctor(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="About how long it may take.")] = 30.0,
    trace: Annotated[
        Path | None, typer.Option(help="File for torch's profiler trace of some steps (Chrome's).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where a training's time goes here, and which overrides would help, each measured."""
    from hf_fasttrain.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from hf_fasttrain.study.doctor import doctor as examine
    from hf_fasttrain.study.doctor import print_diagnosis
    from hf_fasttrain.study.techniques import hardware

    with _ended_by_ctrl_c():
        diagnosis = examine(loaded, hardware(), seconds=seconds, tell=_say_on_stderr, trace=trace)
    if as_json:
        print(json.dumps(diagnosis.as_json(), indent=2))
    else:
        print_diagnosis(_wide_console(), diagnosis)


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """End with its status on Ctrl-C; SIGTERM is taken for it, so that arms and their files are cleaned up."""
    from hf_fasttrain.stop import handled

    try:
        with handled(signal.SIGTERM, signal.default_int_handler):
            yield
    except KeyboardInterrupt:
        sys.exit(Stopped.CTRL_C)


def _wide_console() -> Console:
    """Return a console whose tables are not folded where there is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _command_line() -> str:
    return without_secrets(shlex.join(["hf-fasttrain", *sys.argv[1:]]))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from hf_fasttrain.recipe_file import json_schema

    print(json.dumps(json_schema(), indent=2))


@recipes_app.callback()
def list_recipes(context: typer.Context) -> None:
    """List the shipped recipes with their headers."""
    if context.invoked_subcommand is not None:
        return
    for name, path in shipped_recipes().items():
        print(name)
        for line in recipe_header(path).splitlines():
            print(f"    {line}")


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    target: Annotated[Path | None, typer.Argument(help="File to write; by default NAME.yaml here.")] = None,
) -> None:
    """Copy a shipped recipe, to be changed."""
    shipped = shipped_recipes()
    if name not in shipped:
        raise UserError(f"no shipped recipe '{name}'; there are {', '.join(shipped)}.{nearest(name, shipped)}")
    path = target or Path(f"{Path(name).name}.yaml")
    if path.exists():
        raise UserError(f"{path} exists already; give another file to write")
    try:
        path.write_text(shipped[name].read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}; give another file to write") from None
    print(path)


CacheFolder = Annotated[Path | None, typer.Option("--dir", help="Folder of the caches, if data.cache_dir names one.")]


@cache_app.callback()
def list_kept(context: typer.Context, folder: CacheFolder = None) -> None:
    """List the decoded pixels kept on disk, the last used first."""
    if context.invoked_subcommand is not None:
        context.obj = folder
        return
    from hf_fasttrain.data.cache import default_cache_dir, list_caches

    where = folder or default_cache_dir()
    entries = list_caches(where)
    for entry in entries:
        size = f"{entry.num_bytes / 1e9:8.3f} GB"
        print(f"{entry.path.name}  {size}  last used {entry.last_used_text}  {entry.dataset}: {entry.settings}")
    print(f"{sum(entry.num_bytes for entry in entries) / 1e9:.3f} GB in {where}")


@cache_app.command("clean")
def clean_kept(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(help="Names as listed; needed unless --all is given.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete all of them.")] = False,
    unused_days: Annotated[float | None, typer.Option(min=0, help="Those not used for so many days.")] = None,
    folder: CacheFolder = None,
) -> None:
    """Delete decoded pixels kept on disk."""
    from hf_fasttrain.data.cache import chosen_caches, default_cache_dir, remove_cache

    freed = 0
    for entry in chosen_caches(folder or context.obj or default_cache_dir(), names or [], everything, unused_days):
        remove_cache(entry)
        freed += entry.num_bytes
        print(f"deleted {entry.path.name}: {entry.dataset}, {entry.num_bytes / 1e9:.3f} GB")
    print(f"freed {freed / 1e9:.3f} GB")
