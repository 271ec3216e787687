"""The console script: each verb parses, calls one function, prints."""

import contextlib
import dataclasses
import errno
import functools
import io
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, Positional, arg

Format = Literal["native", "hf", "internvl"]
Dtype = Literal["float32", "bfloat16", "float16"]
_err = Console(stderr=True)
_out = Console()


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # the run's fate, not the user's mistake


class Failed(RuntimeError):
    """The command ran and did not reach its goal: exit code 1."""


def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 0 on success, 1 on a failed run, 2 on bad usage or bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=_err, show_path=False)],
    )
    logging.getLogger("mis_jax").setLevel(logging.INFO)
    for noisy in ("absl", "jax", "orbax", "PIL", "matplotlib", "h5py", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    name, verb, rest = _find_verb(words)
    try:
        _run(name, verb, rest)
    except KeyboardInterrupt:
        _fail("stopped; run the same command again to go on", 1)
    except Exception as error:
        if debug:
            raise
        from mis_jax.train.loop import FailedRun

        failed = isinstance(error, Failed | FailedRun)
        if not failed and not isinstance(error, ValueError | OSError):
            _fail(f"{type(error).__name__}: {error} (a fault of mis-jax? --debug shows where)", 1)
        disk = isinstance(error, OSError) and error.errno in _DISK_ERRORS
        _fail(str(error), 1 if failed or disk else 2)


def convert(
    src: Annotated[Positional[Path], arg(metavar="SRC")],
    dst: Annotated[Positional[Path], arg(metavar="DST")],
    *,
    format: Format,
    dtype: Dtype | None = None,
    shard_size: str = "5GB",
    adapter: Path | None = None,
    allow_nan: bool = False,
) -> None:
    """Write a checkpoint in another format. Interrupted, the same command finishes it.

    Example: mis-jax convert InternVL2_5-8B internvl-8b --format native --dtype bfloat16

    Until it is finished the folder is called DST.incomplete.

    Args:
        src: Checkpoint folder in any of the three formats.
        dst: Folder to write; it must not exist yet.
        format: native (ours), hf (transformers) or internvl (the original internvl_chat).
        dtype: Number format of the weights; the file's own without it.
        shard_size: Largest safetensors file, such as 5GB or 500MB.
        adapter: Folder of a LoRA adapter in PEFT's format to merge into the weights.
        allow_nan: Convert tensors that hold NaN or infinity as they are.
    """
    from mis_jax.terminal import bytes_bar
    from mis_jax.weights import convert
    from mis_jax.weights.checkpoint import open_checkpoint

    shard_bytes = _bytes(shard_size)
    opened = open_checkpoint(src, adapter)
    with bytes_bar(_err) as bar:
        convert.convert(
            opened,
            dst,
            format,
            dtype=dtype,
            shard_bytes=shard_bytes,
            allow_nonfinite=allow_nan,
            progress=bar.task("converting"),
        )
    _out.print(f"wrote {dst} ({format}, {dtype or opened.dtype})")


def inspect(src: Annotated[Positional[Path], arg(metavar="SRC")], *, json: bool = False) -> None:
    """What a checkpoint folder holds, and what is wrong with it. Exit code 1 if anything is.

    Example: mis-jax inspect InternVL2_5-8B

    Args:
        src: Checkpoint folder in any of the three formats.
        json: Print JSON.
    """
    from mis_jax.weights.inspect import inspect_checkpoint

    found = inspect_checkpoint(src)
    if json:
        _print_json(found)
    else:
        for key, value in found.items():
            if key != "problems":
                _out.print(f"{key:>20}  {value}", highlight=False)
        for problem in found["problems"]:
            _out.print(f"[red]problem[/]  {problem}", highlight=False)
    if found["problems"]:
        raise Failed(f"{src}: {len(found['problems'])} problem(s)")


def verify(
    a: Annotated[Positional[Path], arg(metavar="A")],
    b: Annotated[Positional[Path], arg(metavar="B")],
    *,
    dtype: Dtype | None = None,
    layers: bool = False,
    min_overlap: float = 0.99,
    max_kl: float = 1e-3,
    max_difference: float | None = None,
    max_relative: float = 1e-2,
    json: bool = False,
) -> None:
    """Compare two checkpoints on fixed prompts with pictures. Exit code 1 past the thresholds.

    Example: mis-jax verify InternVL2_5-8B internvl-8b

    Computes in float32 with one layer of each in memory, so that any size can be compared.

    Args:
        a: Reference checkpoint.
        b: Checkpoint to compare with it.
        dtype: Round the weights of both to this first; as they are stored without it.
        layers: Show the difference after every layer, and name the first that differs.
        min_overlap: Least share of the five likeliest tokens that both must name.
        max_kl: Largest mean KL divergence of the next-token distributions, in nats.
        max_difference: Largest difference of two logits; not asked without it.
        max_relative: What counts as a layer that differs: norm of the difference over the norm.
        json: Print JSON.
    """
    from mis_jax.data.processor import Processor
    from mis_jax.probes import probe_batches
    from mis_jax.weights.config_json import read_config
    from mis_jax.weights.verify import Thresholds, verify_checkpoints

    processor = Processor.from_folder(a, read_config(a)[0])
    thresholds = Thresholds(min_overlap, max_kl, max_difference)
    result = verify_checkpoints(a, b, probe_batches(processor), thresholds, dtype=dtype)
    first = result.first_beyond(max_relative)
    if json:
        _print_json(dataclasses.asdict(result) | {"first_layer_that_differs": first and first.name})
    else:
        found = result.comparison
        if layers:
            _out.print(_layer_table(result.layers, first))
            _out.print(f"first that differs: {first.name if first else 'none'}")
        _out.print(f"top-k overlap {found.top_k_overlap:.4f}, mean KL {found.kl:.2e} nats,")
        _out.print(
            f"largest difference {found.max_difference:.2e} over {found.positions} positions"
        )
    if not result.passed:
        where = f"; the first layer that differs is {first.name}" if first else ""
        raise Failed(f"{b} does not compute what {a} computes: {'; '.join(result.reasons)}{where}")


def _layer_table(layers: Sequence[Any], first: Any) -> Table:
    table = Table("after", "largest difference", "relative")
    for layer in layers:
        row = (layer.name, f"{layer.max_difference:.2e}", f"{layer.relative:.2e}")
        table.add_row(*row, style="red" if layer is first else None)
    return table


def data_show(
    config: Annotated[Positional[Path], arg(metavar="CONFIG")],
    *,
    index: int = 0,
    picture: Path | None = None,
    json: bool = False,
) -> None:
    """What the model sees of a training sample: prompt, loss mask (green), tiles.

    Example: mis-jax data show configs/mirage.yaml --index 3 --picture tiles.png

    Args:
        config: YAML file of a run.
        index: Number of the sample, before shuffling.
        picture: Write the tiles to this PNG file, an image a line.
        json: Print id, text, input_ids, loss_mask and tiles as JSON.
    """
    from mis_jax.config import load_config
    from mis_jax.data.processor import Processor
    from mis_jax.data.show import show_sample
    from mis_jax.weights.config_json import read_config

    run = load_config(config)
    processor = Processor.from_folder(run.model, read_config(run.model)[0])
    shown = show_sample(run, processor, index)
    if json:
        _print_json(shown.as_json())
    else:
        example = shown.example
        _out.print(shown.as_text())
        _out.print(
            f"[dim]id {example.id}; {len(example.input_ids)} tokens, {example.loss_mask.sum()} "
            f"under the loss; tiles per image {list(example.tiles_per_image)}[/]"
        )
    if picture is not None:
        shown.contact_sheet().save(picture)


def train(config: Any) -> None:
    """Fine-tune. An interrupted run goes on from its output folder when called again."""
    from mis_jax.terminal import steps_bar
    from mis_jax.train.loop import train as run

    with steps_bar(_err) as bar:
        trained = run(config, bar.training("training"))
    _out.print(f"trained {trained.steps} steps in {trained.seconds:.0f} s: {trained.model}")


def generate(
    model: Annotated[Positional[Path], arg(metavar="MODEL")],
    *,
    prompt: str | None = None,
    image: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    system: str = "default",
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_tiles: int | None = None,
    dtype: Dtype | None = None,
    batch: Path | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    r"""Answer one prompt, or many from a file.

    Example: mis-jax generate runs/mirage/final --prompt "What is it?" --image a.png --image b.png

    Args:
        model: Checkpoint folder in any of the three formats.
        prompt: The question; <image> marks where each image belongs, else they come first.
        image: An image file; repeat the option for several.
        system: default (the checkpoint's own), none, or a text.
        max_new_tokens: Longest answer.
        temperature: 0 is greedy.
        top_p: Sample from the most probable tokens of this total probability.
        seed: Of the sampling.
        max_tiles: Tiles of a conversation, divided over its images; the checkpoint's without it.
        dtype: Number format; float32 on a CPU and the file's own elsewhere without it.
        batch: JSON lines with id, prompt and images (a list of paths) instead of --prompt.
        out: Answers to --batch, one JSON line each.
        json: Print text, prompt_tokens, completion_tokens and finish_reason as JSON.
    """
    from mis_jax.generation.files import Request, answer_file, ask_once, printed
    from mis_jax.generation.sampling import Sampling

    if (prompt is None) == (batch is None):
        raise ValueError("give either --prompt TEXT or --batch FILE.jsonl")
    if batch is not None and (out is None or image):
        raise ValueError("--batch needs --out FILE.jsonl, and takes images from the file's rows")
    network, processor = _load_quietly(model, dtype)
    request = Request(
        Sampling(temperature=temperature, top_p=top_p, seed=seed),
        system=system,
        max_new_tokens=max_new_tokens,
        max_tiles=max_tiles,
    )
    if batch is not None and out is not None:
        from mis_jax.terminal import steps_bar

        with steps_bar(_err) as bar:
            answer_file(network, processor, batch, out, request, bar.task("answers"))
        return
    assert prompt is not None
    completion = ask_once(network, processor, prompt, image, request)
    if json:
        _print_json(printed(completion))
    else:
        _out.print(completion.text, markup=False, highlight=False)


def eval_(
    model: Annotated[Positional[Path], arg(metavar="MODEL")],
    *,
    benchmarks: str,
    data_root: Path,
    out: Path,
    batch_size: int = 32,
    dtype: Dtype | None = None,
) -> None:
    """Ask a model the questions of benchmarks. Finished answers are kept when called again.

    Example: mis-jax eval runs/mirage/final --benchmarks mis_hard --data-root data --out runs/eval

    Args:
        model: Checkpoint folder in any of the three formats.
        benchmarks: Ids, separated by commas.
        data_root: Folder with the published files, a folder for each benchmark.
        out: Folder of the evaluation run.
        batch_size: Questions answered at once.
        dtype: Number format; float32 on a CPU and the file's own elsewhere without it.
    """
    from mis_jax.evals.answering import answers_of
    from mis_jax.evals.benchmarks import get_benchmark, size_note
    from mis_jax.evals.hashing import folder_fingerprint
    from mis_jax.evals.manifest import open_run
    from mis_jax.evals.runner import generate_answers
    from mis_jax.terminal import steps_bar

    if str(model).startswith(("http:", "https:")):
        raise ValueError(f"{model}: evaluating an HTTP endpoint is not available in this version")
    chosen = [get_benchmark(name) for name in benchmarks.split(",")]
    sets = [benchmark.load(data_root) for benchmark in chosen]
    fingerprint = folder_fingerprint(model)
    open_run(out, model=model.name, fingerprint=fingerprint, data_root=data_root)
    network, processor = _load_quietly(model, dtype)
    failed = 0
    with steps_bar(_err) as bar:
        for benchmark, samples in zip(chosen, sets, strict=True):
            note = size_note(benchmark.name, len(samples))
            if note:
                _err.print(note)
            ask = answers_of(network, processor, benchmark, rows=batch_size)
            show = bar.task(benchmark.name)
            done = generate_answers(benchmark, samples, ask, out, show, batch_size=batch_size)
            failed += done.failed
    if failed:
        raise Failed(f"{failed} sample(s) have no answer; call again to retry them")
    _out.print(f"answers in {out}; next: mis-jax judge {out}")


def judge(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    judge: str = "default",
    data_root: Path | None = None,
    json: bool = False,
) -> None:
    """Judge the answers of an evaluation run. Finished verdicts are kept when called again.

    Example: mis-jax judge runs/eval --judge rules

    Args:
        run: Folder given to `mis-jax eval --out`.
        data_root: Where the data root of the evaluation is now, if it was moved.
        judge: rules (the mini world), exact (recognition), or each benchmark's own.
        json: Print results.json.
    """
    from mis_jax.evals.judges import get_judge
    from mis_jax.evals.manifest import data_root_of
    from mis_jax.evals.runner import judge_run
    from mis_jax.evals.summary import without_verdict

    chosen = None if judge == "default" else get_judge(judge)
    results = judge_run(run, chosen, data_root or data_root_of(run))
    if json:
        _print_json(results)
    else:
        for benchmark, result in results.items():
            for metric, value in result["metrics"].items():
                shown = "-" if value["value"] is None else f"{100 * value['value']:6.2f} %"
                bounds = f"{100 * value['low']:.1f} to {100 * value['high']:.1f}"
                _out.print(f"{benchmark:>18} {metric:<13} {shown}  ({bounds}; n {value['n']})")
    missing = without_verdict(results)
    if missing:
        raise Failed(f"{missing} sample(s) have no verdict; see the counts in {run}/results.json")


def report(
    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")],
    *,
    out: Path,
    show_samples: bool = False,
    data_root: Path | None = None,
) -> None:
    """Tables with intervals, paired tests and a self-contained page over evaluation runs.

    Example: mis-jax report runs/eval-before runs/eval-after --out runs/report

    Args:
        runs: Evaluation runs; the first is the reference, the second is compared with it.
        out: Folder for report.html, .md, .json, .csv and .tex.
        show_samples: Show prompts and answers, which are redacted without it.
        data_root: With --show-samples, the data root whose pictures are shown beside them.
    """
    from mis_jax.evals.report import write_report

    if not runs:
        raise ValueError("name at least one evaluation run")
    written = write_report(
        [(run.name, run) for run in runs],
        out,
        redact=not show_samples,
        samples_with_pictures=data_root if show_samples else None,
    )
    for path in written:
        _out.print(str(path))


def quickstart(
    *, out: Path = Path("runs/quickstart"), controls: bool = False, seed: int = 0
) -> None:
    """The whole loop on the drawn mini world: a tiny model becomes safe, with the figures.

    Example: mis-jax quickstart --controls

    Args:
        out: Folder for data, models, evaluations and report.
        controls: Fine-tune with the two control label sets too (uniform refusal, text only).
        seed: Of the drawings and the training.
    """
    from mis_jax.quickstart import quickstart as run
    from mis_jax.quickstart import results_table

    outcome = run(out, controls=controls, seed=seed, console=_out)
    _out.print(results_table(outcome.results))
    _out.print(f"fine-tuning took {outcome.training_seconds:.0f} s; the report: {outcome.report}")
    if outcome.missing:
        raise Failed(f"{outcome.missing} sample(s) ended without a verdict")


VERBS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "convert": convert,
    "inspect": inspect,
    "verify": verify,
    "data show": data_show,
    "train": train,
    "generate": generate,
    "eval": eval_,
    "judge": judge,
    "report": report,
}


def _find_verb(words: list[str]) -> tuple[str, Callable[..., None], list[str]]:
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in VERBS:
            return name, VERBS[name], words[length:]
    if words and words[0] == "--version":
        from mis_jax import __version__

        print(__version__)
        raise SystemExit(0)
    lines = [f"  {name:<11} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    text = "usage: mis-jax VERB ... [--debug]\n\n" + "\n".join(lines)
    text += "\n\n`mis-jax VERB --help` shows options and an example."
    if not words or words[0] in ("-h", "--help"):
        print(text)
        raise SystemExit(0 if words else 2)
    _fail(f"unknown verb '{words[0]}'; there are: {', '.join(VERBS)}", 2)


def _run(name: str, verb: Callable[..., None], rest: list[str]) -> None:
    if verb is train:
        train(_train_config(rest))
        return
    description = (verb.__doc__ or "").split("Args:")[0].strip()

    @functools.wraps(verb)
    def parsed(*words: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(verb, *words, **options)

    _parse(parsed, f"mis-jax {name}", rest, description=description)()


def _train_config(rest: list[str]) -> Any:
    """CONFIG from YAML, overridden by `--field value`."""
    from mis_jax.config import DataConfig, RunConfig, Source, TrainConfig, load_config

    if rest and not rest[0].startswith("-"):
        loaded, rest = load_config(Path(rest[0])), rest[1:]
    elif any(word in ("-h", "--help") for word in rest):  # the options, with a stand-in for CONFIG
        sources = (Source("mis", root=Path("ROOT")),)
        loaded = RunConfig(
            Path("MODEL"), Path("OUTPUT"), DataConfig(sources=sources), TrainConfig(epochs=2)
        )
    else:
        raise ValueError("the first argument is the YAML file of a run: mis-jax train CONFIG")
    description = (
        f"{train.__doc__}\n\nExample: mis-jax train configs/mirage.yaml --output runs/mine "
        "--optimizer.learning-rate 1e-5\n\nCONFIG is a YAML file; every option overrides one field."
    )
    return _parse(RunConfig, "mis-jax train CONFIG", rest, default=loaded, description=description)


def _parse(target: Callable[..., Any], program: str, words: list[str], **options: Any) -> Any:
    """tyro's parser, its boxed errors made one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                target, prog=program, args=words, config=(FlagCreatePairsOff,), **options
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip("│ ") for line in said.getvalue().splitlines() if line.startswith("│")]
        wanted = [
            line for line in lines if line.strip("─ ") and not line.endswith(("helptext", "--help"))
        ]
        usage = program.removesuffix(" CONFIG")
        _fail(f"{' '.join(wanted) or said.getvalue().strip()} (see `{usage} --help`)", 2)


def _load_quietly(path: Path, dtype: str | None):
    """Model and processor; float32 on a CPU, whose bf16 products of one row are very slow."""
    import jax

    from mis_jax.api import load
    from mis_jax.terminal import bytes_bar

    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"
    with bytes_bar(_err) as bar:
        return load(path, dtype=dtype, progress=bar.task("reading tensors"))


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.replace(".", "", 1).isdigit():
        raise ValueError(f"--shard-size {text!r}: write a number with KB, MB or GB, such as 5GB")
    return int(float(number) * units[unit])


def _print_json(content: Any) -> None:
    print(json.dumps(content, ensure_ascii=False))


def _fail(message: str, code: int) -> NoReturn:
    _err.print(f"mis-jax: error: {message}", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(code)
