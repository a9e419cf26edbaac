"""`vtrain.shards import` and `export`: their arguments and what they print; the bar and parser of all its commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from vtrain.data.export_simplear import export_simplear
from vtrain.data.format import STORES
from vtrain.data.importers import IMPORTERS, SAMPLES_PER_SHARD, Options, add_options, import_tokens

SHOWN = 20  # reasons of skipped records that are named


@contextmanager
def progress_bar(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """progress(done, total) for the functions of vtrain.data, as a bar where stderr is a terminal."""
    with tqdm(unit=unit, unit_scale=True, desc=name, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def add_command(commands: argparse._SubParsersAction, name: str, short: str, long: str = "") -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=short,
        description=f"{short[0].upper()}{short[1:]}.\n\n{long}".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _import(arguments: argparse.Namespace) -> int:
    """Make or complete a dataset from files of token ids, or one part of its shards."""
    with progress_bar("import", IMPORTERS[arguments.kind].noun) as progress:
        report = import_tokens(
            arguments.kind,
            arguments.inputs,
            arguments.out,
            part=arguments.part,
            parts=arguments.parts,
            samples_per_shard=arguments.samples_per_shard,
            id_store=arguments.id_store,
            options=Options(**{field.name: getattr(arguments, field.name) for field in fields(Options)}),
            max_skipped=arguments.max_skipped,
            progress=progress,
            say=tqdm.write,
        )
    what = f"{arguments.out}: {report.samples} samples, {report.tokens} tokens"
    if not report.complete:
        what += f" in part {arguments.part} of {arguments.parts}; the part that ends last publishes the dataset"
    elif not report.records:
        what += ": complete already"
    print(f"{what}, {report.skipped} skipped, {report.seconds:.1f} s")
    for reason, count in list(report.reasons.items())[:SHOWN]:
        print(f"skipped {count}: {reason}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    """Write a dataset as the files of another program."""
    with progress_bar("export", "sample") as progress:
        done = export_simplear(
            arguments.source,
            arguments.out,
            name=arguments.name,
            resolution=arguments.resolution,
            root=arguments.root,
            progress=progress,
        )
    print(f"{done.meta}: {done.pictures} pictures" + ("" if done.written else ": complete already"))
    return 0


def add_import(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "import",
        "datasets that other programs tokenised become shards",
        "  import megatron PREFIX... --out F --text-vocab N            .bin + .idx, a sample per document\n"
        "  import nanogpt FILE... --out F --text-vocab N --eos ID      .bin of nanoGPT, llm.c, modded-nanogpt\n"
        "  import simplear META|MIX|FOLDER... --out F --text-tokenizer T    codes and captions of SimpleAR\n"
        "  import beingvl FILE... --out F                              tokenized JSONL and npy grids of Being-VL\n"
        "  import image_folder|llava|parquet|vgt|webdataset RECORDS --out F --text-tokenizer T [--template NAME]\n"
        "                                     texts become tokens, pictures lie beside them in the twin `image`\n\n"
        "A run that was killed goes on when it is started again. Records that cannot be taken are counted and listed\n"
        "in skipped.jsonl with the reason. To share the work, start the same command with --part 0 --parts 8, with\n"
        "--part 1 --parts 8, ... on any hosts that see the folder: the bytes are the same as of one process.",
    )
    command.add_argument("kind", choices=IMPORTERS)
    command.add_argument("inputs", nargs="+", metavar="input", help="files; patterns such as x-{000..010}.bin too")
    command.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    command.add_argument("--part", type=int, default=0, help="which share of the shards to make (default: 0)")
    command.add_argument("--parts", type=int, default=1, help="of how many (default: 1)")
    command.add_argument("--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, metavar="N",
                         help=f"(default: {SAMPLES_PER_SHARD})")  # fmt: skip
    command.add_argument("--id-store", choices=STORES, help="how ids are stored (default: as small as the ids allow)")
    command.add_argument("--max-skipped", type=int, default=-1, metavar="N", help="more is an error (default: none is)")
    add_options(command)
    command.set_defaults(run=_import)


def add_export(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "export",
        "a dataset becomes files of another program",
        "  export simplear A --out F    F/NAME/512_codes/0.npy, F/NAME/512_labels/0.npy (text), and the list of them,\n"
        "                               F/NAME_512_<count>_meta.json\n\n"
        "Files have the numbers of the samples; excluded ones are left out. Nothing is written where a sample is not\n"
        "one picture with captions that can be decoded. A run that was killed goes on when it is started again.",
    )
    command.add_argument("kind", choices=("simplear",))
    command.add_argument("source", type=Path, help="dataset folder or manifest")
    command.add_argument("--out", type=Path, required=True, help="folder that the tree and its meta file come to")
    command.add_argument("--name", default="", help="what the tree is called (default: as the dataset's folder)")
    command.add_argument("--resolution", type=int, metavar="N", help="pixels of a side, if the dataset does not say")
    command.add_argument("--root", default="", help="what paths in the meta file begin with (default: its own folder)")
    command.set_defaults(run=_export)
