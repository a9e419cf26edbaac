"""Decoder weights from and to Hugging Face folders (safetensors, one file or sharded).

Ours joins q,k,v and gate,up and keeps one table per vocabulary range; theirs has single projections and one matrix for
all ids. Tensors stream one at a time in both directions: the model is never in memory twice. A folder that vtrain wrote
also has `vocabulary.json` ({"ranges": [[name, size], ...], "specials": {token: id}, "image": how pictures were
prepared, "text": how captions were encoded}) and restores every range exactly.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open

from vtrain import rng
from vtrain.files import fresh_folder, replace, replace_folder, write_durably, write_tensors
from vtrain.models.decoder import Decoder, DecoderConfig, fill_normal_rows, local_rows
from vtrain.models.presets import from_hf_config, to_hf_config
from vtrain.vocab import Vocabulary

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
VOCABULARY = "vocabulary.json"
MATRICES = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
_CHUNK_ROWS = 8192  # rows of a table that are read at a time when it is only looked at


def read_hf_config(folder: str | Path) -> dict:
    """The fields of a folder's `config.json`, for `presets.from_hf_config`. ValueError names the folder or the file."""
    return _read_json(_existing(folder) / CONFIG)


def read_vocabulary(folder: str | Path) -> Vocabulary:
    """The vocabulary of a folder that vtrain wrote; one from elsewhere is a single range `text` of its `vocab_size`."""
    path = _existing(folder) / VOCABULARY
    if not path.is_file():
        path = path.with_name(CONFIG)
    value = _read_json(path)
    try:
        return Vocabulary.from_json(value["ranges"] if path.name == VOCABULARY else [["text", value["vocab_size"]]])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no vocabulary in it: {error}") from error


def check_vocabulary(folder: str | Path, vocab: Vocabulary) -> None:
    """ValueError where a folder that vtrain wrote has another vocabulary than `vocab`."""
    path = _existing(folder) / VOCABULARY
    if path.is_file() and (found := read_vocabulary(folder)) != vocab:
        _refuse(path, found, vocab)


def read_specials(folder: str | Path) -> dict[str, int]:
    """The special tokens (token -> global id) noted in `vocabulary.json`; empty where there is no such file."""
    return _facts(folder, "specials")


def read_image_facts(folder: str | Path) -> dict:
    """How the pictures were prepared that a model was trained on, e.g. {"resolution": 512, "downscale": 16}, as its
    dataset's schema had it; empty where `vocabulary.json` does not say.
    """
    return _facts(folder, "image")


def read_text_facts(folder: str | Path) -> dict:
    """How the captions were encoded that a model was trained on, e.g. {"caption_space": True}: likewise."""
    return _facts(folder, "text")


def _facts(folder: str | Path, key: str) -> dict:
    path = _existing(folder) / VOCABULARY
    return dict(_read_json(path).get(key, {})) if path.is_file() else {}


def load_decoder(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
    """The model of a folder, ready to generate: parameters on `device` in `dtype`, no gradients."""
    config = from_hf_config(read_hf_config(folder), str(Path(folder) / CONFIG))
    vocab = read_vocabulary(folder)
    with torch.device("meta"):
        decoder = Decoder(config, vocab)
    decoder.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    copy_parameters(decoder, import_hf(folder, config, vocab))
    return decoder


@torch.no_grad()
def copy_parameters(decoder: Decoder, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy whole tensors into the parameters; a sharded one takes its own rows. ValueError lists what does not fit."""
    parameters = dict(decoder.named_parameters())
    waiting, problems = set(parameters), []
    for name, tensor in tensors:
        if name not in waiting:
            problems.append(f"unexpected {name}")
        elif parameters[name].shape != tensor.shape:
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(parameters[name].shape)}")
        else:
            local, first = local_rows(parameters[name])
            local.copy_(tensor[first : first + len(local)])
        waiting.discard(name)
    problems += [f"missing {name}" for name in parameters if name in waiting]
    if problems:
        raise ValueError("decoder weights: " + "; ".join(problems))


def import_hf(
    folder: str | Path,
    config: DecoderConfig,
    vocab: Vocabulary,
    *,
    used_rows: int | None = None,
    new_rows: str = "mean",
    seed: int = 0,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of `Decoder(config, vocab)` as (our name, whole CPU tensor), read from a Hugging Face folder.

    Tables come as float32, the rest in the dtype of the file. In a folder from elsewhere row i of the matrices is id i,
    and `kept_rows` tells how many are taken. All other rows are made: new_rows "mean" is the mean of the kept rows,
    "normal" is drawn from (seed, name, row) with std `config.init_std`.
    ValueError lists all keys that are missing, unmapped or of another shape; a folder with a `vocabulary.json` that
    differs from `vocab` is refused. Checks run at the call, tensors are read as the iterator is drawn.
    """
    if new_rows not in ("mean", "normal"):
        raise ValueError(f"new_rows: {new_rows!r}, expected mean or normal")
    folder = _existing(folder)
    ours = (folder / VOCABULARY).is_file()
    check_vocabulary(folder, vocab)
    files = _Files(folder)
    _check_keys(files, config, vocab, exact=ours)
    return _read(files, config, vocab, new_rows, seed, used_rows)


def kept_rows(rows: int, vocab: Vocabulary, used_rows: int | None = None) -> int:
    """How many ids, from 0 on, have rows of their own in matrices of so many rows.

    All, where there is just one row per id: such a model has the codes, too (SimpleAR's have 215,672 rows). Otherwise
    it is a text model: those of the first range, of which `used_rows` were trained, as many as its tokenizer has ids
    (None = all); what follows is padding.
    """
    first = vocab.ranges[0].size
    return rows if rows == vocab.size else min(rows, first, first if used_rows is None else used_rows)


def _read(
    files: _Files, config: DecoderConfig, vocab: Vocabulary, new_rows: str, seed: int, used_rows: int | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for part, matrix in _matrices(config).items():
        stored = files.slice(matrix)
        have = kept_rows(stored.get_shape()[0], vocab, used_rows)
        mean = _mean_row(stored, have) if have < vocab.size and new_rows == "mean" else None
        for r in vocab.ranges:
            name = f"{part}.{r.name}"
            table = torch.zeros(r.rows, config.hidden)
            known = min(max(have - r.base, 0), r.size)
            if known:
                table[:known] = stored[r.base : r.base + known]
            if known < r.size and mean is not None:
                table[known : r.size] = mean
            elif known < r.size:
                fill_normal_rows(table[known : r.size], rng.fold(seed, name), known, config.init_std)
            yield name, table
    for name, pieces in _pieces(config).items():
        tensors = [files.slice(key)[:] for key, _ in pieces]
        yield name, tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def export_hf(
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: DecoderConfig,
    vocab: Vocabulary,
    folder: str | Path,
    *,
    specials: Mapping[str, int] | None = None,
    image: Mapping[str, object] | None = None,
    text: Mapping[str, object] | None = None,
    max_shard_bytes: float = 5e9,
    dtype: torch.dtype | None = None,
) -> None:
    """Write (our name, whole tensor) pairs, each parameter once, in any order, as a Hugging Face folder.

    Padding rows are stripped and ranges joined into one matrix. specials, image and text: facts of the dataset that
    `vocabulary.json` keeps. A file holds at most `max_shard_bytes` (or one tensor); more than one come with an index.
    `dtype` None keeps that of the tensors. The folder is written beside its place and renamed, an older one is
    replaced; after an error nothing is left. ValueError lists names or shapes that do not fit.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".tmp-{folder.name}")
    fresh_folder(temporary)
    try:
        writer = _Writer(temporary, max_shard_bytes, dtype)
        for key, tensor in _to_hf(tensors, config, vocab):
            writer.add(key, tensor)
        writer.finish()
        hf = to_hf_config(config, vocab) | {"torch_dtype": str(writer.saved_dtype).removeprefix("torch.")}
        _write_json(temporary / CONFIG, hf)
        facts = {"ranges": vocab.to_json(), "specials": dict(specials or {})}
        facts |= {key: dict(found) for key, found in (("image", image), ("text", text)) if found}
        _write_json(temporary / VOCABULARY, facts)
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _to_hf(
    tensors: Iterable[tuple[str, torch.Tensor]], config: DecoderConfig, vocab: Vocabulary
) -> Iterator[tuple[str, torch.Tensor]]:
    """(their key, tensor) in the order of `tensors`; a matrix follows the last of its tables."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Decoder(config, vocab).named_parameters()}
    pieces = _pieces(config)
    tables: dict[str, torch.Tensor] = {}
    seen: set[str] = set()
    for name, tensor in tensors:
        if name not in shapes or name in seen:
            raise ValueError(f"export: {'second' if name in seen else 'unexpected'} tensor {name}")
        if tensor.shape != shapes[name]:
            raise ValueError(f"export: {name} is {list(tensor.shape)}, expected {list(shapes[name])}")
        seen.add(name)
        tensor = tensor.detach()
        if name in pieces:
            parts = tensor.split([shape[0] for _, shape in pieces[name]])
            yield from zip((key for key, _ in pieces[name]), parts)
            continue
        part, range_name = name.split(".")
        tables[name] = tensor[: vocab[range_name].size].cpu()
        names = [f"{part}.{r}" for r in vocab.names]
        if tables.keys() >= set(names):
            yield MATRICES[part], torch.cat([tables.pop(n) for n in names])
    if missing := [name for name in shapes if name not in seen]:
        raise ValueError(f"export: missing {', '.join(missing)}")


def _matrices(config: DecoderConfig) -> dict[str, str]:
    """{part of our names: their one matrix}: a tied model has no head of its own."""
    return {part: key for part, key in MATRICES.items() if part == "embed" or not config.tied}


def _pieces(config: DecoderConfig) -> dict[str, list[tuple[str, list[int]]]]:
    """Our name (tables apart) -> the keys and shapes that it joins along dimension 0."""
    C, D = config.hidden, config.head_dim
    rows = {"q": config.heads * D, "k": config.kv_heads * D, "v": config.kv_heads * D}
    out: dict[str, list[tuple[str, list[int]]]] = {}
    for n in range(config.layers):
        ours, theirs = f"layers.{n}", f"model.layers.{n}"
        out[f"{ours}.attn_norm"] = [(f"{theirs}.input_layernorm.weight", [C])]
        out[f"{ours}.qkv"] = [(f"{theirs}.self_attn.{x}_proj.weight", [r, C]) for x, r in rows.items()]
        if config.qkv_bias:
            out[f"{ours}.qkv_bias"] = [(f"{theirs}.self_attn.{x}_proj.bias", [r]) for x, r in rows.items()]
        if config.qk_norm:
            out[f"{ours}.q_norm"] = [(f"{theirs}.self_attn.q_norm.weight", [D])]
            out[f"{ours}.k_norm"] = [(f"{theirs}.self_attn.k_norm.weight", [D])]
        out[f"{ours}.out"] = [(f"{theirs}.self_attn.o_proj.weight", [C, config.heads * D])]
        out[f"{ours}.ffn_norm"] = [(f"{theirs}.post_attention_layernorm.weight", [C])]
        out[f"{ours}.gate_up"] = [(f"{theirs}.mlp.{x}_proj.weight", [config.ffn, C]) for x in ("gate", "up")]
        out[f"{ours}.down"] = [(f"{theirs}.mlp.down_proj.weight", [C, config.ffn])]
    out["norm"] = [("model.norm.weight", [C])]
    return out


class _Files:
    """The tensors of a folder by key. Only the file last read from stays open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._name, self._file = "", None
        if (folder / WEIGHTS).is_file():
            self.files = dict.fromkeys(self._open(WEIGHTS).keys(), WEIGHTS)
        elif (folder / INDEX).is_file():
            self.files = self._read_index(folder / INDEX)
        else:
            raise ValueError(f"{folder}: no weights: expected {WEIGHTS} or {INDEX}")

    def _open(self, name: str):
        if name != self._name:
            try:
                self._name, self._file = name, safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{self.folder / name}: not a readable safetensors file: {error}") from error
        return self._file

    def _read_index(self, path: Path) -> dict[str, str]:
        weight_map = _read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
            raise ValueError(f"{path}: no weight_map of keys to file names")
        names = sorted(set(weight_map.values()))
        problems = [f"{name!r} is not the name of a file beside it" for name in names if Path(name).name != name]
        problems += [f"{name} is missing" for name in names if not (path.parent / name).is_file()]
        if not problems:
            for name in names:
                listed = {key for key, file in weight_map.items() if file == name}
                differing = sorted(listed ^ set(self._open(name).keys()))
                problems += [f"{name} and the index differ in {', '.join(differing)}"] if differing else []
        if problems:
            raise ValueError(f"{path}: {'; '.join(problems)}")
        return weight_map

    def slice(self, key: str):
        """A lazy slice: `.get_shape()`, and `[rows]` reads."""
        return self._open(self.files[key]).get_slice(key)


def _check_keys(files: _Files, config: DecoderConfig, vocab: Vocabulary, exact: bool) -> None:
    """ValueError unless the folder has just the tensors of the model; `exact`: matrices have one row per id."""
    expected = {key: shape for pieces in _pieces(config).values() for key, shape in pieces}
    matrices = _matrices(config)
    expected |= {key: [vocab.size, config.hidden] for key in matrices.values()}
    derived = {key for key in files.files if key.endswith(".rotary_emb.inv_freq")}  # written by old transformers
    repeated = set()
    if config.tied and {MATRICES["embed"], MATRICES["head"]} <= files.files.keys():
        repeated = {MATRICES["head"]} if _equal_matrices(files) else set()
    problems = [f"missing {key}" for key in expected if key not in files.files]
    problems += [f"unmapped {key}" for key in sorted(files.files.keys() - expected.keys() - derived - repeated)]
    for key, file in sorted(files.files.items(), key=lambda item: item[1]):
        if key not in expected:
            continue
        found, wanted = files.slice(key).get_shape(), expected[key]
        free_rows = key in matrices.values() and not exact and len(found) == 2 and found[0] > 0
        if (found[1:] if free_rows else found) != (wanted[1:] if free_rows else wanted):
            problems.append(f"{key} in {file} is {found}, expected {['any', *wanted[1:]] if free_rows else wanted}")
    if problems:
        raise ValueError(f"{files.folder}: weights of another model: {'; '.join(problems)}")


def _equal_matrices(files: _Files) -> bool:
    """Whether lm_head repeats embed_tokens, as some checkpoints of tied models have it."""
    embed = files.slice(MATRICES["embed"])
    head = files.slice(MATRICES["head"])
    if embed.get_shape() != head.get_shape():
        return False
    starts = range(0, embed.get_shape()[0], _CHUNK_ROWS)
    return all(torch.equal(embed[a : a + _CHUNK_ROWS], head[a : a + _CHUNK_ROWS]) for a in starts)


def _mean_row(stored, rows: int) -> torch.Tensor:
    """The mean of the first `rows` rows, float32[C]."""
    chunks = (stored[a : min(a + _CHUNK_ROWS, rows)] for a in range(0, rows, _CHUNK_ROWS))
    return (sum(chunk.to(torch.float64).sum(dim=0) for chunk in chunks) / rows).to(torch.float32)


class _Writer:
    """Collects tensors into files of limited size. Their number is known at the end: then they get their names."""

    def __init__(self, folder: Path, max_bytes: float, dtype: torch.dtype | None) -> None:
        self.folder, self.max_bytes, self.dtype = folder, max_bytes, dtype
        self.saved_dtype: torch.dtype | None = None  # of the tensor added last
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, key: str, tensor: torch.Tensor) -> None:
        tensor = tensor.to("cpu", self.dtype or tensor.dtype).contiguous()
        if self.pending and self.pending_bytes + tensor.nbytes > self.max_bytes:
            self._flush()
        self.pending[key] = tensor
        self.pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        self.saved_dtype = tensor.dtype

    def _flush(self) -> None:
        write_tensors(self.folder / f"shard-{len(self.shards)}", self.pending, {"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        """Write what is left, name the files, write the index if there are several."""
        self._flush()
        names = [WEIGHTS]
        if len(self.shards) > 1:
            total = len(self.shards)
            names = [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
            weight_map = {key: name for keys, name in zip(self.shards, names) for key in keys}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(self.folder / INDEX, index)
        for n, name in enumerate(names):
            replace(self.folder / f"shard-{n}", self.folder / name)


def _refuse(path: Path, found: Vocabulary, wanted: Vocabulary) -> NoReturn:
    """ValueError with what differs between two vocabularies."""
    sizes, expected = dict(found.to_json()), dict(wanted.to_json())
    names = [*sizes, *(name for name in expected if name not in sizes)]
    differing = [n for n in names if sizes.get(n) != expected.get(n)]
    problems = [f"{n} {sizes.get(n, 'absent')}, expected {expected.get(n, 'absent')}" for n in differing]
    problems = problems or [f"ranges in the order {list(sizes)}, expected {list(expected)}"]
    raise ValueError(f"{path}: another vocabulary than the data's: {'; '.join(problems)}")


def _existing(folder: str | Path) -> Path:
    path = Path(folder)
    if not path.is_dir():
        hub_name = path if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(folder)) else "<organisation>/<model>"
        raise ValueError(f"{path}: no such model folder; fetch it with: hf download {hub_name} --local-dir {path}")
    return path


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {type(value).__name__} at the top, expected an object")
    return value


def _write_json(path: Path, value: Mapping) -> None:
    write_durably(path, json.dumps(value, indent=2) + "\n")
