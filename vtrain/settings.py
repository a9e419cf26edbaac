"""The settings of every command: sections as frozen dataclasses, each key with its default and one line.

docs/config.md is generated from this file: `python scripts/config_reference.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vtrain.config import REQUIRED, ConfigError, key

COMPOSERS = ("text_to_image", "language_model", "chat")
SPECIALS = ("<|t2i|>", "<|soi|>", "<|eoi|>", "<|pad|>")
DTYPES = ("auto", "bf16", "fp32")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where the job works."""

    out: str = key(REQUIRED, "the folder that everything is written to")
    device: str = key("auto", "auto = a GPU where there is one", choices=("auto", "cpu", "cuda"))
    threads: int = key(0, "CPU threads of a process; 0 = torch's default", min=0)


@dataclass(frozen=True, kw_only=True)
class SeededRun(Run):
    """Where the job works, and its seed."""

    seed: int = key(0, "key of every random draw", min=0)


@dataclass(frozen=True, kw_only=True)
class TrainingRun(SeededRun):
    """Where the job works, its seed and its label."""

    timeout_s: float = key(600.0, "seconds without progress after which a rank names what it does and ends", above=0)
    deterministic: bool = key(False, "only deterministic GPU kernels; slower; CPU runs always are")
    name: str = key("", "a label for trackers; empty = the name of the folder")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The decoder: a preset or a local Hugging Face folder; the other keys change the preset."""

    preset: str = key("", "a named shape such as llama-3.2-1b or digits (vtrain/models/presets.py)")
    init: str = key("", "a local Hugging Face folder to take shape and weights from")
    layers: int = key(0, "number of blocks; 0 = the preset's", min=0)
    hidden: int = key(0, "width; 0 = the preset's", min=0)
    heads: int = key(0, "query heads; 0 = the preset's", min=0)
    kv_heads: int = key(0, "key and value heads; 0 = the preset's", min=0)
    head_dim: int = key(0, "width of a head; 0 = the preset's", min=0)
    ffn: int = key(0, "inner width of the feed-forward part; 0 = the preset's", min=0)
    max_positions: int = key(0, "longest sequence the model is said to take; 0 = the preset's", min=0)
    qkv_bias: bool | None = key(None, "bias of the query, key and value projections; none = as the preset")
    qk_norm: bool | None = key(None, "RMS norm of queries and keys; none = as the preset")
    tied: bool | None = key(None, "head and embedding share their table; none = as the preset")

    def __post_init__(self) -> None:
        if bool(self.preset) == bool(self.init):
            raise ConfigError("set one of preset and init" + ("; both are set" if self.preset else ""))
        changed = [name for name, value in vars(self).items() if value and name not in ("preset", "init")]
        if self.init and changed:
            raise ConfigError(f"{', '.join(changed)}: a model from init keeps its own shape; remove these keys")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset of the mixture, a folder made by vtrain.extract."""

    path: str = key(REQUIRED, "the dataset's folder")
    weight: float = key(1.0, "share of the training tokens, relative to the other sources", above=0)
    name: str = key("", "name in logs; empty = the name of the folder")
    max_epochs: int = key(0, "stop drawing from it after so many passes; 0 = no limit", min=0)
    weight_schedule: tuple[tuple[float, float], ...] = key(
        (),
        "[[tokens, weight], ...]: weight over the tokens drawn of all sources, linear between; empty = constant",
        min=0,
    )
    composer: str = key("", "composer of this source; empty = data.composer", choices=("", *COMPOSERS))


@dataclass(frozen=True, kw_only=True)
class Data:
    """How samples become packed batches."""

    sources: tuple[Source, ...] = key(REQUIRED, "the datasets")
    composer: str = key(
        "text_to_image",
        "the sequence made of a sample: caption then codes, its tokens as they are stored, or the turns of a chat",
        choices=COMPOSERS,
    )
    pack_tokens: int = key(4096, "tokens of a packed batch, the unit of memory", min=2)
    max_documents: int = key(0, "samples in a packed batch; 0 = pack_tokens // 16 + 2", min=0)
    drop_caption: float = key(0.1, "chance that a sample loses its caption (for guidance)", min=0, max=1)
    sample_short: bool = key(
        True, "draw among all captions of a picture; false = the second of several (the long one in SimpleAR's data)"
    )
    prefixes: tuple[str, ...] = key((), "style openers, one of which is drawn and put before a caption")
    max_caption_tokens: int = key(0, "captions are cut to so many tokens; 0 = never", min=0)
    train_on: str = key("assistant", "turns of a chat that are learned", choices=("assistant", "all"))
    overlong: str = key("error", "a sample longer than pack_tokens", choices=("error", "drop", "split", "crop"))
    pool: int = key(512, "samples that the packer can choose from", min=1)
    order: str = key("global", "samples of an epoch in any order, or block by block", choices=("global", "blocks"))
    block: int = key(4096, "samples of a block", min=1)
    open_blocks: int = key(64, "blocks that are read at a time", min=1)
    strict: bool = key(
        True, "a resumed run must have the same datasets and settings; false = also grown or changed ones"
    )
    prefetch: int = key(2, "steps prepared ahead", min=0)
    readahead: int = key(0, "steps planned ahead whose samples are fetched from disk", min=0)
    restart: bool = key(False, "a later stage begins its sources anew; false = it goes on where the last one stopped")

    def __post_init__(self) -> None:
        _check_names(self.sources)


@dataclass(frozen=True, kw_only=True)
class Init:
    """What a later stage takes over from the one before it ([[stage]])."""

    weights: str = key("raw", "the last weights of the stage before, or their averages (optim.ema)",
                       choices=("raw", "ema"))  # fmt: skip
    drop: tuple[str, ...] = key((), "shell patterns of parameters of the stage before that are left behind")
    new: tuple[str, ...] = key((), "shell patterns of parameters that begin anew")
    optimizer: bool = key(False, "keep the optimizer's state, too")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What of a sequence is learned, and against what."""

    text_weight: float = key(1.0, "loss weight of caption tokens; 0 = only codes are learned", min=0)
    visual_softmax: str = key(
        "full",
        "codes are told from all ids, or from each other alone (another loss, 13-24 % less work)",
        choices=("full", "visual_only"),
    )


@dataclass(frozen=True, kw_only=True)
class EvalSource:
    """One dataset to validate on."""

    path: str = key(REQUIRED, "the dataset's folder")
    name: str = key("", "name in logs; empty = the name of the folder")
    composer: str = key("", "composer of this source; empty = data.composer", choices=("", *COMPOSERS))


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Validation: the loss of held-out datasets."""

    sources: tuple[EvalSource, ...] = key((), "held-out datasets")
    every: int = key(0, "steps between evaluations, and one at the end; 0 = never", min=0)
    batches: int = key(0, "packed batches of a source in one evaluation, over all ranks; 0 = all", min=0)

    def __post_init__(self) -> None:
        if self.every and not self.sources:
            raise ConfigError(f"every is {self.every} and sources is empty; expected [[eval.sources]]")
        _check_names(self.sources)


def _check_names(sources: tuple[Source | EvalSource, ...]) -> None:
    names = [source.name or Path(source.path).name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"sources: {names.count(name)} are called {name}; give each a name of its own")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its learning rate."""

    lr: float = key(3e-4, "peak learning rate", above=0)
    betas: tuple[float, float] = key((0.9, 0.95), "AdamW's decay rates of the two moments", min=0, max=1)
    eps: float = key(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = key(0.1, "decay of matrices, times lr", min=0)
    schedule: str = key("cosine", "after the warmup", choices=("constant", "cosine", "wsd"))
    warmup: int = key(0, "steps of linear warmup", min=0)
    decay: float = key(0.2, "share of all steps in which wsd goes down", min=0, max=1)
    min_lr: float = key(0.0, "where cosine and wsd end, as a share of lr", min=0, max=1)
    ema: float = key(0.0, "decay of the averaged weights that are evaluated and exported; 0 = none", min=0, max=1)
    grad_clip: float = key(1.0, "largest L2 norm of the gradients; 0 = no clipping", min=0)


@dataclass(frozen=True, kw_only=True)
class Train:
    """The length of the training and what is trained."""

    steps: int = key(REQUIRED, "optimizer steps", min=1)
    tokens_per_step: int = key(65536, "tokens of a step over all ranks, a multiple of data.pack_tokens", min=1)
    max_bad_steps: int = key(10, "steps skipped for a loss or gradient that is not finite before the run ends", min=0)
    trainable: tuple[str, ...] = key(("*",), "shell patterns of the parameters that are trained")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How a model is spread over ranks."""

    dtype: str = key("auto", "what is computed in; auto = bf16 on a GPU, fp32 on a CPU", choices=DTYPES)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Saving and resuming."""

    every: int = key(0, "steps between checkpoints, and one at the end; 0 = only at the end", min=0)
    keep: int = key(2, "newest checkpoints that stay; 0 = all", min=0)
    resume: str = key("auto", "auto = from the newest in run.out, never, or the path of a checkpoint")
    trainable_only: bool = key(
        False, "leave frozen parameters out; a resumed run takes them from model.init or the seed"
    )
    best: bool = key(True, "also save and keep the checkpoint with the lowest validation loss")
    export: str = key("best", "the weights of run.out/final; best = last without validation or with best=false",
                      choices=("best", "last"))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is reported while training; run.out/metrics.jsonl is always written."""

    every: int = key(10, "steps between reports", min=1)
    sinks: tuple[str, ...] = key(("console",), "where else they go", choices=("console", "tensorboard", "wandb"))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn."""

    cfg: float = key(1.0, "guidance scale; 1 = none", min=0)
    temperature: float = key(1.0, "0 = always the likeliest token", min=0)
    top_k: int = key(0, "draw among the k likeliest tokens; 0 = all", min=0)
    top_p: float = key(1.0, "draw among the likeliest tokens that reach this probability", above=0, max=1)
    repetition_penalty: float = key(1.0, "above 1, codes that are there already are less likely; 1 = off", above=0)
    negative: str = key("", "what guidance leads away from, a prompt; empty = the prompt without a caption")
    per_prompt: int = key(1, "pictures per prompt", min=1)
    batch_size: int = key(64, "pictures drawn at a time", min=1)


@dataclass(frozen=True, kw_only=True)
class TrainingPictures(Sampling):
    """Pictures drawn while training, into run.out/samples."""

    every: int = key(0, "steps between grids of pictures; 0 = never", min=0)
    prompts: tuple[str, ...] = key((), "captions to draw, each after one of data.prefixes where there are some")

    def __post_init__(self) -> None:
        if self.every and not self.prompts:
            raise ConfigError(f"every is {self.every} and prompts is empty; expected captions to draw")


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """python -m vtrain.pretrain"""

    run: TrainingRun
    model: Model
    init: Init
    data: Data
    loss: Loss
    eval: Eval
    optim: Optim
    train: Train
    parallel: Parallel
    checkpoint: Checkpoint
    log: Log
    sample: TrainingPictures

    # One process runs all stages on one device into one folder; all draws have one seed.
    same_in_stages = ("run", "parallel", "log.sinks", "checkpoint.resume")

    def __post_init__(self) -> None:
        if self.train.tokens_per_step % self.data.pack_tokens:
            raise ConfigError(
                f"train.tokens_per_step is {self.train.tokens_per_step}; "
                f"expected a multiple of data.pack_tokens = {self.data.pack_tokens}"
            )
        _check_warmup(self.optim.warmup, self.train.steps)


def _check_warmup(warmup: int, steps: int) -> None:
    if warmup > steps:
        raise ConfigError(f"optim.warmup is {warmup}; expected at most train.steps = {steps}")


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What the fields of a record are called, where they are not called as the kind has it."""

    image: str = key("", "of the picture: a key, a column, in a tar the ending of its file; empty = the kind's own")
    caption: tuple[str, ...] = key((), "of captions: keys or columns, of llava human or gpt; empty = the kind's own")


@dataclass(frozen=True, kw_only=True)
class Records:
    """Pictures with captions: a JSONL of {"image": path, "caption": str or list of str}, or what other tools write."""

    kind: str = key(
        "image_folder",
        "a folder with or without JSONL; JSON of LLaVA, VGT or SimpleAR (also YAML); Parquet or Arrow tables; or tars",
        choices=("image_folder", "llava", "parquet", "simplear", "vgt", "webdataset"),
    )
    records: str = key("", "the JSONL, JSON, tars or tables; of an image folder, empty = all images in it")
    images: str = key("", "the folder that image paths are relative to; empty = the folder of records")
    annotations: str = key("", "the folder that annotation paths are relative to (vgt); empty = images")
    fields: Fields

    def options(self) -> dict:
        """What vtrain.data.sources.open_source takes."""
        names = {name: getattr(self, name) for name in ("kind", "records", "images", "annotations")}
        return {**names, "image": self.fields.image, "captions": self.fields.caption}


@dataclass(frozen=True, kw_only=True)
class Images(Records):
    """Pictures with captions, and how they are prepared."""

    crop: str = key(
        "center",
        "how a square is made: center = Lanczos, then the middle; adm = halved, bicubic, then the middle (SimpleAR)",
        choices=("center", "adm"),
    )
    filter: str = key("bicubic", "how small images are enlarged (center)", choices=("nearest", "bicubic", "lanczos"))
    threads: int = key(4, "threads that read and resize", min=1)


@dataclass(frozen=True, kw_only=True)
class HeldOutImages:
    """Validation of an image tokenizer on held-out images, of the same kind as those of input."""

    records: str = key("", "the JSONL or JSON; of an image folder, empty = all images in it")
    images: str = key("", "the folder that image paths are relative to; empty = the folder of records")
    every: int = key(0, "steps between evaluations, and one at the end; 0 = never", min=0)

    def __post_init__(self) -> None:
        if self.every and not (self.images or self.records):
            raise ConfigError(f"every is {self.every}; expected records or images to evaluate on")


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """The image tokenizer: a convolutional autoencoder around a quantizer."""

    resolution: int = key(512, "side of the images in pixels", min=1)
    base_channels: int = key(128, "channels at full resolution", min=1)
    channel_multiplier: tuple[int, ...] = key(
        (1, 1, 2, 2, 4),
        "channels of each level, times base_channels; a level has half the resolution of the last",
        min=1,
    )
    num_res_blocks: int = key(2, "residual blocks of a level", min=1)
    latent_channels: int = key(256, "channels between the networks and the quantizer", min=1)
    attention: bool = key(True, "self-attention in the middle of encoder and decoder")
    norm_groups: int = key(0, "groups of the group norms; 0 = base_channels // 4, at most 32", min=0)
    quantizer: str = key("vq", "a learned codebook, or rounding to levels", choices=("vq", "fsq"))
    embed_dim: int = key(256, "width of a code (vq)", min=1)
    num_embeddings: int = key(8192, "number of codes (vq)", min=2)
    ema_decay: float = key(0.99, "decay of the codebook's running means (vq)", min=0, max=1)
    dead_threshold: float = key(0.1, "codes used less than this share of the mean use start anew (vq)", min=0)
    fsq_levels: tuple[int, ...] = key((8, 8, 8, 5, 5, 5), "levels of each dimension of a code (fsq)", min=2)


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """The terms of the autoencoder's loss."""

    l1: float = key(0.0, "weight of the absolute error", min=0)
    l2: float = key(1.0, "weight of the squared error", min=0)
    commitment: float = key(0.25, "weight of the distance between latents and their codes (vq)", min=0)

    def __post_init__(self) -> None:
        if not self.l1 + self.l2:
            raise ConfigError("l1 and l2 are both 0; expected one above 0")


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrain:
    """The length of the training."""

    steps: int = key(REQUIRED, "optimizer steps", min=1)
    images_per_step: int = key(256, "images of a step over all ranks", min=1)
    max_bad_steps: int = key(10, "steps skipped for a loss or gradient that is not finite before the run ends", min=0)
    micro_batch: int = key(0, "images in one forward; 0 = a rank's whole share of a step", min=0)


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """python -m vtrain.autoencoder"""

    run: TrainingRun
    input: Images
    eval: HeldOutImages
    model: Autoencoder
    loss: AutoencoderLoss
    optim: Optim
    train: AutoencoderTrain
    parallel: Parallel
    checkpoint: Checkpoint
    log: Log

    def __post_init__(self) -> None:
        _check_warmup(self.optim.warmup, self.train.steps)


@dataclass(frozen=True, kw_only=True)
class ExtractInput(Images):
    """Pictures with captions, and how they are prepared."""

    resolution: int = key(0, "side of the images in pixels; 0 = the image tokenizer's", min=0)
    max_skipped: int = key(-1, "unusable records that are put up with; -1 = any number but all", min=-1)


@dataclass(frozen=True, kw_only=True)
class Tokenizers:
    """What encodes images and captions; both are copied into the dataset."""

    image: str = key(REQUIRED, "folder of the image tokenizer, one of vtrain.autoencoder or of Cosmos")
    text: str = key(REQUIRED, "file or folder of the text tokenizer")
    specials: tuple[str, ...] = key(SPECIALS, "tokens appended to the text tokenizer")
    fold: bool = key(True, "compute single images in the exact 2-D form of a video tokenizer (Cosmos DV)")


@dataclass(frozen=True, kw_only=True)
class Extract:
    """How the work is cut."""

    batch_size: int = key(64, "images encoded at a time", min=1)
    dtype: str = key("fp32", "what the image tokenizer computes in", choices=("fp32", "bf16"))
    short_captions: bool = key(False, "before a picture's only caption its first sentence is stored as another one")
    caption_space: bool = key(False, "captions are encoded as after a word, with a space before: for data.prefixes")
    samples_per_shard: int = key(16384, "samples of a shard, the unit of work and of resuming", min=1)


@dataclass(frozen=True, kw_only=True)
class ExtractSettings:
    """python -m vtrain.extract"""

    run: Run
    input: ExtractInput
    tokenizer: Tokenizers
    extract: Extract


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What draws the pictures."""

    path: str = key(REQUIRED, "a model folder, such as run.out/final of a training")
    resolution: int = key(0, "side of the pictures in pixels; 0 = what it was trained on", min=0)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is drawn: a file or a list."""

    file: str = key("", "a text file with a prompt per line, JSONL with the key prompt, or what --bench takes")
    texts: tuple[str, ...] = key((), "the prompts themselves")
    prefixes: tuple[str, ...] = key(
        (), "style openers, one of which is drawn and put before a prompt; those of data.prefixes are to be given here"
    )

    def __post_init__(self) -> None:
        if bool(self.file) == bool(self.texts):
            raise ConfigError("set one of file and texts" + ("; both are set" if self.file else ""))


@dataclass(frozen=True, kw_only=True)
class FinishedSampling(Sampling):
    """How pictures are drawn."""

    speculate: int = key(0, "codes guessed at a time and checked in one forward (Jacobi decoding); 0 = none", min=0)


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """python -m vtrain.sample"""

    run: SeededRun
    model: TrainedModel
    prompts: Prompts
    sample: FinishedSampling


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where the job writes."""

    out: str = key(REQUIRED, "the folder that everything is written to")


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """The tokenizer to train."""

    vocab_size: int = key(8000, "pieces; 256 bytes come on top, so that any text can be encoded", min=2)


@dataclass(frozen=True, kw_only=True)
class TextTokenizerSettings:
    """python -m vtrain.text_tokenizer"""

    run: Output
    input: Records
    tokenizer: TextTokenizer


COMMANDS = {
    "autoencoder": AutoencoderSettings,
    "extract": ExtractSettings,
    "pretrain": PretrainSettings,
    "sample": SampleSettings,
    "text_tokenizer": TextTokenizerSettings,
}
