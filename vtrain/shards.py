"""Look at datasets of token shards, check them, and make datasets out of others; only shuffle rewrites samples.

    python -m vtrain.shards inspect PATH               schema, counts, lengths and first samples; a sheet of pictures
    python -m vtrain.shards inspect --composed CFG     a packed batch of a vtrain.pretrain config as the model sees it
    python -m vtrain.shards stats PATH                 lengths, modalities, compression, and a packing forecast
    python -m vtrain.shards verify PATH                every byte; exit code 1 if anything is wrong
    python -m vtrain.shards import KIND FILE... --out C   datasets that other programs tokenised become shards
    python -m vtrain.shards export simplear A --out F  the way back: SimpleAR's codes, captions and meta file
    python -m vtrain.shards build FOLDER               list what finished writers have left in a folder
    python -m vtrain.shards append FOLDER SHARD...     list more shards at the end of a dataset
    python -m vtrain.shards merge A B --out C          one dataset that lists the shards of several
    python -m vtrain.shards exclude FOLDER ...         samples that nobody may read, and back
    python -m vtrain.shards shuffle A --out B          the same samples, rewritten in a random order

A dataset is a folder of shards and manifests, manifest-<generation>-<hash>.json. build, append and exclude write its
next generation: sample numbers stay, older generations stay readable by their file names, and a run that is resumed
finds the samples it had. Any number of processes may work on one folder. `COMMAND --help` tells more.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vtrain.config import load
from vtrain.data import edit, exclude, manifest
from vtrain.data.exchange import add_command, add_export, add_import, progress_bar
from vtrain.data.reader import Dataset, Shard
from vtrain.data.shuffle import shuffle
from vtrain.data.stats import measure
from vtrain.data.verify import verify
from vtrain.inspection import (
    decode_pictures,
    describe,
    describe_sample,
    load_if_there,
    tokenizer_problems,
)
from vtrain.settings import PretrainSettings
from vtrain.text import load_text_tokenizer
from vtrain.train.tasks.pretrain import Plan
from vtrain.visual import load_image_tokenizer
from vtrain.visual.sheets import contact_sheet, write_png

PACK_TOKENS = (4096, 8192, 16384)  # what stats forecasts where no --pack-tokens is given
SHOWN = 20  # adopted shards, and the like, that are named


def run_verify(path: Path) -> int:
    """Print every problem of a dataset folder, shard or twin, then the verdict; 0 if there is none, else 1."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such dataset folder or shard")
    start, size = time.perf_counter(), 0
    with progress_bar("verify", "B") as show:

        def progress(done: int, total: int) -> None:
            nonlocal size
            size = done
            show(done, total)

        problems = verify(path, progress)
    seconds = time.perf_counter() - start
    if path.is_dir():
        problems += tokenizer_problems(path)
    for problem in problems:
        print(f"problem: {problem}")
    verdict = f"{len(problems)} problems" if problems else "ok, no problem"
    print(f"{path}: {verdict}; {size / 1e6:.1f} MB in {seconds:.2f} s ({size / 1e9 / seconds:.1f} GB/s)")
    return 1 if problems else 0


def run_inspect(path: Path, out: Path, count: int) -> int:
    """Print what a dataset or a shard is, and draw its first pictures to `out` if it has any."""
    source = Shard(path) if path.suffix == ".vts" else Dataset(path)
    folder = path.parent if path.is_file() else path
    shown = _first_readable(source, count)
    text = load_if_there(load_text_tokenizer, folder / "text_tokenizer", source.schema.text_tokenizer)
    print(describe(source))
    print("\nfirst samples")
    captions = {i: describe_sample(source, i, text) for i in shown}
    image = load_if_there(load_image_tokenizer, folder / "image_tokenizer", source.schema.image_tokenizer)
    if image is None:
        missing = f"{folder / 'image_tokenizer'} is not there" if source.schema.image_tokenizer else "no picture codes"
        print(f"\nno contact sheet: {missing}")
        return 0
    pictures = [(frames, captions[i]) for i in shown for frames in decode_pictures(source, i, image)]
    if not pictures:
        print("\nno contact sheet: no picture in these samples")
        return 0
    write_png(out, contact_sheet(*zip(*pictures)))
    print(f"\n{len(pictures)} pictures: {out}")
    return 0


def _first_readable(source: Dataset | Shard, count: int) -> list[int]:
    """The first `count` samples that are not excluded."""
    excluded = source.manifest.excluded if isinstance(source, Dataset) else np.zeros((0, 2), dtype=np.int64)
    kept = exclude.without(np.array([[0, len(source)]]), excluded)
    return [i for first, last in kept[:count].tolist() for i in range(first, min(last, first + count))][:count]


def run_composed(cfg: str, count: int) -> int:
    """Print the first packed batch that training with `cfg` would see, `count` of its documents piece by piece."""
    plan = Plan(load(PretrainSettings, cfg))
    print(plan.describe())
    print(plan.describe_batch(count))
    return 0


def run_stats(path: Path, pack_tokens: Sequence[int], plot: Path | None, as_json: bool) -> int:
    """Measure a dataset and print the report; its picture goes to `plot`."""
    with progress_bar("stats", "sample") as progress:
        found = measure(Dataset(path), pack_tokens or PACK_TOKENS, progress)
    print(found.json() if as_json else found.describe())
    if plot is not None:
        from vtrain.data.stats_plot import draw  # here: matplotlib is an extra

        draw(found, plot)
        print(f"\nplot: {plot}", file=sys.stderr if as_json else sys.stdout)
    return 0


def run_build(folder: Path, every_byte: bool) -> int:
    """Publish what finished writers have left in a folder; 1 where a shard there cannot be used."""
    with progress_bar("build", "shard") as progress:
        built = edit.build(folder, every_byte=every_byte, progress=progress)
    _print_some("adopted", built.adopted)
    _print_some("removed", built.removed)
    _print_some("kept", built.kept)
    for problem in built.problems:
        print(f"problem: {problem}")
    _print_generation(built.path)
    return 1 if built.problems else 0


def _print_some(what: str, names: Sequence[str]) -> None:
    for name in names[:SHOWN]:
        print(f"{what}: {name}")
    if len(names) > SHOWN:
        print(f"{what}: {len(names) - SHOWN} more")


def _print_generation(path: Path) -> None:
    found = manifest.load(path)
    print(
        f"{found.folder}: generation {found.generation}, {found.samples} samples in {len(found.shards)} shards, "
        f"{found.tokens} tokens, {found.excluded_samples} excluded, {found.skipped} skipped ({path.name})"
    )


def run_append(folder: Path, files: Sequence[Path], other: Path | None, copy: bool, twins: bool) -> int:
    before = manifest.latest(folder) if folder.is_dir() else None
    with progress_bar("append", "shard") as progress:
        if other is not None:
            path = edit.append_datasets(folder, [other], copy=copy, twins=twins, progress=progress)
        else:
            path = edit.append_shards(folder, files, copy=copy, progress=progress)
    if before is not None and before.path == path:
        print("nothing new: the dataset has these shards already")
    _print_generation(path)
    return 0


def run_merge(sources: Sequence[Path], out: Path, copy: bool, twins: bool) -> int:
    with progress_bar("merge", "shard") as progress:
        path = edit.merge(sources, out, copy=copy, twins=twins, progress=progress)
    _print_generation(path)
    return 0


def run_exclude(arguments: argparse.Namespace) -> int:
    """Exclude the samples that the arguments name, or take them back; 1 where damage has no samples to name."""
    folder, problems = arguments.folder, []
    if arguments.samples is not None:
        ranges = exclude.parse(arguments.samples)
    elif arguments.keys is not None:
        with progress_bar("keys", "sample") as progress:
            ranges = exclude.with_keys(Dataset(folder), exclude.read_keys(arguments.keys), progress)
    elif arguments.shard is not None:
        if arguments.block is None:
            raise ValueError("--shard NAME needs --block N: the number that verify gives")
        ranges = exclude.of_blocks(manifest.load(folder), arguments.shard, [arguments.block])
    else:
        with progress_bar("verify", "B") as progress:
            ranges, problems = exclude.damaged(manifest.load(folder), progress)
    for problem in problems:
        print(f"problem: {problem}")
    before = manifest.load(folder).excluded_samples
    path = (exclude.put_back if arguments.include else exclude.leave_out)(folder, ranges)
    change = manifest.load(path).excluded_samples - before
    print(f"{abs(change)} samples {'taken back' if arguments.include else 'more are excluded'}")
    _print_generation(path)
    return 1 if problems else 0


def run_shuffle(source: Path, out: Path, seed: int, samples_per_shard: int, drop_twins: bool) -> int:
    with progress_bar("shuffle", "sample") as progress:
        path = shuffle(
            source, out, seed=seed, samples_per_shard=samples_per_shard, drop_twins=drop_twins, progress=progress
        )
    _print_generation(path)
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m vtrain.shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_inspect,
        _add_stats,
        _add_verify,
        add_import,
        add_export,
        _add_build,
        _add_append,
        _add_merge,
        _add_exclude,
        _add_shuffle,
    ):
        add(commands)
    return top


def _add_verify(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "verify",
        "check every byte",
        "All checksums, padding and numbers of a shard, of a twin, or of everything in a dataset folder, its\n"
        "tokenizers too. Exit code 1 if there is any problem; each is one line that names file and block.",
    )
    command.add_argument("path", type=Path, help="dataset folder, shard or twin")
    command.set_defaults(run=lambda a: run_verify(a.path))


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    command = add_command(commands, "inspect", "show what is inside")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("path", type=Path, nargs="?", help="dataset folder, manifest or shard")
    what.add_argument(
        "--composed", metavar="CFG", help="a config file or recipe of vtrain.pretrain: show a packed batch"
    )
    command.add_argument("--out", type=Path, default=Path("sheet.png"), help="contact sheet (default: sheet.png)")
    command.add_argument("--count", type=int, default=16, help="samples to show (default: 16)")
    command.set_defaults(
        run=lambda a: run_composed(a.composed, a.count) if a.composed else run_inspect(a.path, a.out, a.count)
    )


def _add_stats(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "stats",
        "measure a dataset",
        "Quantiles of the lengths, tokens by modality, samples by kind of segment, bytes, repeated keys; and what\n"
        "the packer will make of it: fill, bins, documents per bin, and how evenly ranks are loaded.",
    )
    command.add_argument("path", type=Path, help="dataset folder or manifest")
    command.add_argument(
        "--pack-tokens",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help=f"forecast bins of N tokens; may be given again (default: {' '.join(map(str, PACK_TOKENS))})",
    )
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it (needs the extra `plots`)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=lambda a: run_stats(a.path, a.pack_tokens, a.plot, a.json))


def _add_build(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "build",
        "list what finished writers have left in a folder",
        "Publishes the first or next generation: the shards of part-<worker>.json files, and shards that no manifest\n"
        "lists, in the order of their names. Temporary files of writers that are dead are removed: a living one holds\n"
        "a lock on its file. A shard that cannot be used is reported and left out, exit code 1.",
    )
    command.add_argument("folder", type=Path)
    command.add_argument("--verify", action="store_true", help="check every byte of the adopted shards first")
    command.set_defaults(run=lambda a: run_build(a.folder, a.verify))


def _add_linking(command: argparse.ArgumentParser) -> None:
    command.add_argument("--copy", action="store_true", help="copy files; without it they become hard links")
    command.add_argument("--no-twins", action="store_true", help="leave feature and blob twins behind")


def _add_append(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "append",
        "list more shards at the end of a dataset",
        "A new generation; the samples that are there keep their numbers. Shards from elsewhere are hard-linked into\n"
        "the folder; one whose name is taken gets another.",
    )
    command.add_argument("folder", type=Path, help="dataset folder, or a new one")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("shards", type=Path, nargs="*", default=[], metavar="SHARD", help="*.vts files")
    what.add_argument("--from", type=Path, dest="other", metavar="FOLDER2", help="all shards of another dataset")
    _add_linking(command)
    command.set_defaults(run=lambda a: run_append(a.folder, a.shards, a.other, a.copy, not a.no_twins))


def _add_merge(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "merge",
        "one dataset that lists the shards of several",
        "The samples of A come first, then those of B, and so on; exclusions and twins come along, tokenizers are\n"
        "copied from the first that has them. Schemas must be equal. Files are hard links, so nothing is copied.",
    )
    command.add_argument("sources", type=Path, nargs="+", metavar="DATASET", help="folders or manifests")
    command.add_argument("--out", type=Path, required=True, help="folder of the new dataset")
    _add_linking(command)
    command.set_defaults(run=lambda a: run_merge(a.sources, a.out, a.copy, not a.no_twins))


def _add_exclude(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "exclude",
        "samples that nobody may read, and back",
        "A new generation with other exclusions. Numbers and counts stay: the loader passes over excluded samples.",
    )
    command.add_argument("folder", type=Path, help="dataset folder")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--samples", metavar="3,17-20", help="by number, ranges with both ends")
    what.add_argument("--keys", type=Path, metavar="FILE", help="by key, one per line, decimal or 0x...")
    what.add_argument("--shard", metavar="NAME", help="all that lie in --block of this shard")
    what.add_argument("--from-verify", action="store_true", help="all that lie in damaged blocks")
    command.add_argument("--block", type=int, metavar="N", help="with --shard: a block, as verify numbers them")
    command.add_argument("--include", action="store_true", help="take the named samples back instead")
    command.set_defaults(run=run_exclude)


def _add_shuffle(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "shuffle",
        "the same samples, rewritten in a random order",
        "For storage where blocks are read in order: sorted data needs a shuffle on disk once. The order is a\n"
        "function of the seed. Memory stays at about three output shards; scratch files beside OUT hold every sample\n"
        "once while it runs. A run that was killed begins again. Excluded samples are left behind.",
    )
    command.add_argument("source", type=Path, help="dataset folder or manifest")
    command.add_argument("--out", type=Path, required=True, help="folder of the new dataset")
    command.add_argument("--seed", type=int, default=0, help="(default: 0)")
    command.add_argument(
        "--samples-per-shard", type=int, default=0, metavar="N", help="(default: shards of about 256 MB)"
    )
    command.add_argument("--drop-twins", action="store_true", help="leave feature and blob twins behind")
    command.set_defaults(run=lambda a: run_shuffle(a.source, a.out, a.seed, a.samples_per_shard, a.drop_twins))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough; what is still buffered must not fail at exit, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
