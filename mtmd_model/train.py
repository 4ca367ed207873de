"""One training run: files in, a model's folder out."""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from mtmd_model import checkpoint
from mtmd_model.allocator import keep_freed_memory
from mtmd_model.architectures import build, config_to_dict
from mtmd_model.batch import PREDICTED_ROWS, Batch
from mtmd_model.calibration import calibrate
from mtmd_model.compiled import compile_parts
from mtmd_model.config import MTMDConfig
from mtmd_model.data import WindowData, slice_logits
from mtmd_model.encoder import fit_encoder
from mtmd_model.lightning_module import OptimiserConfig, RankerModule
from mtmd_model.predict import Predictor
from mtmd_model.schema import Schema
from mtmd_model.slice_balance import slice_factors, slice_weights
from mtmd_model.two_tower import TwoTower, count_parameters

OnEpoch = Callable[[Mapping[str, Any]], None]


class Diverged(RuntimeError):
    """A loss that is not a finite number: the same training ends there again."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run, besides its data.

    Raises:
        ValueError: a value that no run can have.
    """

    architecture: str = "mtmd"
    """A name in `architectures.ARCHITECTURES`."""
    model: Any = field(default_factory=lambda: MTMDConfig.preset("small"))
    """The architecture's configuration; for `mtmd` an `MTMDConfig`."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """AdamW and its learning rate."""
    sample_rate: float = 1.0
    """Share of the training rows to learn from, drawn by the seed; validation takes all."""
    slice_balance: float = 0.0
    """How far small slices are weighed up in the loss (`slice_balance`): 0 not at all, 1 until all count alike."""
    id_dropout: float = 0.0
    """Probability that an open-ended feature's id counts as unknown in training (`id_dropout`)."""
    averaged_passes: float = 0.0
    """Memory, in passes, of averaged weights, which are validated and kept (`averaging`); 0 for those of the last step."""
    batch_size: int = 4096
    """Largest number of rows of a batch."""
    block_rows: int | None = None
    """Rows held in memory at a time, twice, with the window left in its files (`feed.StreamFeed`): for one that does
    not fit. None holds the whole window and shuffles all of it."""
    resident: bool = False
    """Hold the window on the device, where batches are gathered (`feed.ResidentFeed`): for a GPU with room for it."""
    max_epochs: int = 12
    """Passes over the window, at most; the cosine ends here."""
    patience: int = 3
    """Epochs without a lower validation loss before training stops."""
    calibrate: bool = True
    """Add constants to the biases, by the sums of predictions and scores of the validation days (`calibration`)."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient; 0 for none."""
    seed: int = 0
    """Of the initial weights and the shuffles; on a CPU it decides every number."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train: `gpu` is a CUDA device, `auto` one if there is one. No other has float64."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Of experts, cross layers and projections in training. Routers with their softmax, dot products, losses and weights
    stay in fp32, domain statistics and sums in float64; validation and predictions are fp32 throughout."""
    compile: bool = False
    """Train with `torch.compile` (`compiled`), which takes minutes to build; with a warning without it where there is no
    compiler."""
    progress_bar: bool = False
    """Draw one."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)!r}")
        if self.block_rows is not None and self.block_rows < self.batch_size:
            raise ValueError(f"block_rows must be None or at least batch_size, got {self.block_rows!r}")
        if self.resident and self.block_rows is not None:
            raise ValueError("resident holds the whole window, block_rows leaves it in its files: choose one")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {self.sample_rate!r}")
        if not 0 <= self.slice_balance <= 1:
            raise ValueError(f"slice_balance must be in [0, 1], got {self.slice_balance!r}")
        if not 0 <= self.id_dropout < 1:
            raise ValueError(f"id_dropout must be in [0, 1), got {self.id_dropout!r}")
        if not 0 <= self.averaged_passes < math.inf:
            raise ValueError(f"averaged_passes must be 0 or more, got {self.averaged_passes!r}")
        if not 0 <= self.gradient_clip < math.inf:
            raise ValueError(f"gradient_clip must be 0 or more, got {self.gradient_clip!r}")
        if self.accelerator not in ("auto", "cpu", "gpu"):
            raise ValueError(f"accelerator must be 'auto', 'cpu' or 'gpu', got {self.accelerator!r}")
        if self.precision not in ("32-true", "bf16-mixed"):
            raise ValueError(f"precision must be '32-true' or 'bf16-mixed', got {self.precision!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "model": config_to_dict(self.model)}


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    predictor: Predictor
    """The model, on the CPU."""
    manifest: Mapping[str, Any]
    """As written."""
    out_dir: Path
    """Where it lies."""

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry an epoch: epoch, train_loss, validation_loss, validation_logmae; before calibration."""
        return list(self.manifest["history"])

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights were kept, from 0."""
        return int(self.manifest["best_epoch"])


def train(
    schema: Schema,
    train_files: Sequence[str | Path],
    validation_files: Sequence[str | Path],
    config: TrainConfig,
    out_dir: str | Path,
    on_epoch: OnEpoch | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Fit the vocabularies and a model, and write its folder.

    Stops `patience` epochs after the best validation loss and keeps that epoch's weights. Without validation
    files it runs all epochs and keeps the last. The random state of the caller is left as it was.

    Args:
        train_files: Parquet files of joined examples, the training window.
        validation_files: the same of the days to stop on.
        out_dir: the model's folder, replaced whole.
        on_epoch: called with each epoch's entry of the history, as it ends.
        manifest: further JSON-ready entries for the manifest, such as `code_version` and `window`.

    Raises:
        ValueError: files without rows or with rows that cannot be encoded, a schema without a model, no label to
            learn from or to stop on, no CUDA GPU where one is asked for, or a reserved entry of the manifest.
        Diverged: a loss is not finite.
        RuntimeError: a file changed while it was read.
    """
    checkpoint.check_entries(manifest or {})
    accelerator = resolve_accelerator(config.accelerator)
    keep_freed_memory()
    started = time.perf_counter()
    hashes = {f: checkpoint.file_hash(f) for f in [*train_files, *validation_files]}
    encoder = fit_encoder(schema, train_files)
    data = WindowData(
        encoder, train_files, validation_files, config.batch_size, config.seed, config.block_rows, config.resident
    )
    _check_unchanged(hashes)
    data.sample(config.sample_rate)
    _check_labels(data.blocks(data.window), "training")
    if data.validation is not None:
        _check_labels(data.blocks(data.validation), "validation")
    loaded = time.perf_counter()
    with torch.random.fork_rng(), _quiet():
        torch.manual_seed(config.seed)
        model = build(config.architecture, encoder, config.model)
        weight_SP = torch.zeros(len(schema.surfaces), len(schema.products), dtype=torch.float64)
        # one pass for all: the window may lie in its files
        blocks = (_counted(block, model, weight_SP) for block in data.blocks(data.window))
        model.bias.set(slice_logits(blocks, encoder, model.constrained))
        model.keep_counted_ids()
        factors = slice_factors(weight_SP, config.slice_balance)
        module = RankerModule(model, config.optimiser, factors, config.id_dropout, config.averaged_passes)
        if config.compile:
            compile_parts(model, torch.device(accelerator))
        best = _BestEpoch(on_epoch)
        stop = EarlyStopping("validation_loss", patience=config.patience, check_finite=False)
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=config.precision,
            max_epochs=config.max_epochs,
            gradient_clip_val=config.gradient_clip or None,
            callbacks=[best, stop] if validation_files else [best],
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if validation_files else 0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=config.progress_bar,
        )
        trainer.fit(module, datamodule=data)
    if best.weights is not None:
        model.load_state_dict(best.weights)
    model.eval()
    ratios = _calibrated(model, data, torch.device(accelerator)) if config.calibrate and validation_files else None
    model.to("cpu")
    if config.block_rows is not None:
        _check_unchanged(hashes)

    entries = {
        "train_config": config.to_dict(),
        "seed": config.seed,
        "rows": {"train": len(data.window), "validation": len(data.validation or ())},
        "train_files": [str(f) for f in train_files],
        "validation_files": [str(f) for f in validation_files],
        "data_hashes": dict(zip(_names(list(hashes)), hashes.values(), strict=True)),
        "params": count_parameters(model),
        "normalisation": model.normalisation(),
        "calibration": ratios,
        "best_epoch": best.epoch,
        "history": module.history,
        "seconds": {"load": loaded - started, "fit": time.perf_counter() - loaded},
        "torch_version": str(torch.__version__),
        **(manifest or {}),
    }
    written = checkpoint.save(out_dir, model, encoder, config.architecture, config.model, entries)
    # a compiled model would be compiled anew for every size of batch that it predicts
    predictor = checkpoint.load(out_dir) if config.compile else Predictor(model, encoder, written)
    return TrainResult(predictor, written, Path(out_dir))


def resolve_accelerator(name: str) -> Literal["cpu", "cuda"]:
    """Lightning's name of where to train; its own `auto` would take a Mac's GPU, which has no float64.

    Raises:
        ValueError: `gpu` without a CUDA GPU.
    """
    cuda = torch.cuda.is_available()
    if name == "gpu" and not cuda:
        raise ValueError("accelerator is 'gpu', but there is no CUDA GPU: use 'auto' or 'cpu'")
    return "cuda" if cuda and name != "cpu" else "cpu"


def _calibrated(model: TwoTower, data: WindowData, device: torch.device) -> dict[str, float | None]:
    """Calibrate a model on the validation days; task -> sum of predictions over sum of scores as it was before."""
    model.to(device)
    days = data.validation
    assert days is not None
    # what was compiled for training would be compiled anew for these batches
    with torch.compiler.set_stance("force_eager"):
        ratio_T = calibrate(model, lambda: _on(device, data.blocks(days)))
    names = [task.name for task in model.schema.tasks]
    return {name: r if math.isfinite(r) else None for name, r in zip(names, ratio_T.tolist(), strict=True)}


def _on(device: torch.device, blocks: Iterable[Batch]) -> Iterator[Batch]:
    """Batches of a size to predict."""
    for block in blocks:
        for start in range(0, len(block), PREDICTED_ROWS):
            yield block.slice(start, start + PREDICTED_ROWS).to(device)


def _check_unchanged(hashes: Mapping[str | Path, str]) -> None:
    for f, digest in hashes.items():
        if checkpoint.file_hash(f) != digest:
            raise RuntimeError(f"{f} changed while it was read: train again")


def _counted(block: Batch, model: TwoTower, weight_SP: Tensor) -> Batch:
    model.count_ids(block)
    weight_SP += slice_weights(block, *weight_SP.shape)
    return block


def _check_labels(blocks: Iterable[Batch], name: str) -> None:
    if not any((~block.labels.isnan().all(1) & (block.weight > 0)).any() for block in blocks):
        raise ValueError(f"no {name} row has both a label and a weight above zero")


def _names(files: Sequence[str | Path]) -> list[str]:
    """A file's last two parts, `ds=2026-01-01/data.parquet`: the same wherever the lake lies. Whole if not unique."""
    short = ["/".join(Path(f).parts[-2:]) for f in files]
    return short if len(set(short)) == len(short) else [str(f) for f in files]


class _BestEpoch(L.Callback):
    """Keeps the weights of the epoch with the lowest validation loss, in memory.

    Separate parts of a model (`TwoTower.separate_parts`) keep those of their own best epoch each; one that has no
    validation rows goes with the model.
    """

    def __init__(self, on_epoch: OnEpoch | None) -> None:
        self.on_epoch = on_epoch
        self.loss = float("inf")
        self.epoch = 0
        self.weights: dict[str, Tensor] | None = None
        self.part_loss: dict[str, float] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning calls callbacks before the module, whose history therefore lacks this epoch
        assert isinstance(pl_module, RankerModule)
        entry = pl_module.finish_epoch()
        for name in ("train_loss", "validation_loss"):
            if entry[name] is not None and not math.isfinite(entry[name]):
                raise Diverged(f"{name} of epoch {entry['epoch']} is {entry[name]}, not a finite number")
        if entry["validation_loss"] is None:
            self.epoch = entry["epoch"]
        else:
            self._keep(entry, pl_module)
        if self.on_epoch is not None:
            self.on_epoch(entry)

    def _keep(self, entry: Mapping[str, Any], module: RankerModule) -> None:
        now = {k: v.detach().cpu().clone() for k, v in module.model.state_dict().items()}
        parts = module.model.separate_parts()
        losses = {prefix: module.slice_loss(slices) for prefix, slices in parts.items()}
        old = self.weights
        if entry["validation_loss"] < self.loss:
            self.loss, self.epoch = entry["validation_loss"], entry["epoch"]
            self.weights = dict(now)
        assert self.weights is not None
        for prefix, slices in parts.items():
            if math.isnan(losses[prefix]):
                continue
            better = losses[prefix] < self.part_loss.get(prefix, math.inf)
            source = now if better or old is None else old
            if better:
                self.part_loss[prefix] = losses[prefix]
            for name in self.weights:
                if name.startswith(prefix):
                    self.weights[name] = source[name]
            bias = self.weights["bias.logits_TSP"] = self.weights["bias.logits_TSP"].clone()
            for s, p in slices:
                bias[:, s, p] = source["bias.logits_TSP"][:, s, p]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning says of every run: the devices it found, its tips, its worker processes."""
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message="GPU available but not used.*")
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
