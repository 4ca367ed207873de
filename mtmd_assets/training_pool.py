"""The trainings of experiments: what each is called, and many at a time, each in a process of its own on one thread.

A model of this size spends its time between small matrix products: two of them on a thread each are faster than one
after the other on two threads, and one thread gives the same numbers on any number of cores.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtmd_assets import model_store
from mtmd_assets.contenders import Change, model_schema, train_config
from mtmd_assets.home import Site

if TYPE_CHECKING:
    from mtmd_model.schema import Schema
    from mtmd_model.train import TrainConfig


@dataclass(frozen=True)
class TrainJob:
    """The arguments of `mtmd_model.train.train`, and a name for the log."""

    name: str
    schema: "Schema"
    train_files: tuple[Path, ...]
    validation_files: tuple[Path, ...]
    config: "TrainConfig"
    folder: Path
    manifest: Mapping[str, Any]

    @property
    def trained(self) -> bool:
        """Whether its model is there."""
        return (self.folder / "manifest.json").is_file()

    @property
    def diverged(self) -> Path:
        """Where it says so, if its loss ceased to be finite: trained again it would do the same."""
        return self.folder.with_name(f"{self.name}.diverged")

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.trained or self.diverged.is_file()


def training_jobs(
    site: Site, window: Sequence[date], trainings: Mapping[str, tuple[Change, int]]
) -> dict[str, TrainJob]:
    """The trainings of an experiment on a window, the last day of which decides when to stop.

    Args:
        trainings: what sets each apart and its seed, by a label. A job's name has the label, and a hash of code, data and
            settings: a folder that is there was trained by the same.
    """
    platform = site.platform
    data = model_store.data_hashes(site, window)
    manifest = {"platform": platform.name, "window": [str(d) for d in window], "data": data}
    *fitted, stopped_on = (site.warehouse.path("joined_examples", d) for d in window)
    jobs = {}
    for label, (change, seed) in trainings.items():
        schema, config = model_schema(platform, change), train_config(platform, change, seed)
        name = f"{window[-1]}-{label}-{_digest(data, schema, config.to_dict())}"
        folder = site.experiments / name
        jobs[label] = TrainJob(name, schema, tuple(fitted), (stopped_on,), config, folder, manifest)
    return jobs


def is_current(name: str, data: Mapping[str, str], schema: "Schema", config: Mapping[str, Any]) -> bool:
    """Whether a job of this name would have it today too: by the same code, on these data (`model_store.data_hashes`)."""
    return name.endswith(_digest(data, schema, config))


def _digest(data: Mapping[str, str], schema: "Schema", config: Mapping[str, Any]) -> str:
    """A hash of all that decides a training."""
    code = model_store.code_version(config["architecture"])
    ingredients = {"data": data, "schema": schema.to_dict(), "code": code, "config": config}
    return model_store.digest(ingredients)


def train_all(jobs: Sequence[TrainJob], workers: int, log: Callable[[str], None]) -> None:
    """Train every job; `workers` at a time, 0 for one a core. With one worker nothing leaves this process.

    One that diverges says so, leaves `TrainJob.diverged` and no model, and stops no other.
    """
    workers = min(len(jobs), workers or _cores())
    if workers <= 1:
        for n, job in enumerate(jobs, 1):
            log(f"{n}/{len(jobs)} {_train(job)}")
        return
    # spawned, for a forked copy of a process that has used torch's threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        try:
            for n, done in enumerate(as_completed([pool.submit(_train, job) for job in jobs]), 1):
                log(f"{n}/{len(jobs)} {done.result()}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def end_with_parent() -> None:
    """End this worker when the process that started it is gone: one that is killed cannot tell its workers to stop."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _cores() -> int:
    """Those that this process may use, where the system says so (not on a Mac)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _train(job: TrainJob) -> str:
    """Train one job; says how it went."""
    import torch

    from mtmd_model.train import Diverged, train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        job.diverged.unlink(missing_ok=True)
        manifest = {
            **job.manifest,
            "model_version": job.name,
            "code_version": model_store.code_version(job.config.architecture),
        }
        result = train(job.schema, job.train_files, job.validation_files, job.config, job.folder, manifest=manifest)
    except Diverged as e:
        job.diverged.parent.mkdir(parents=True, exist_ok=True)
        job.diverged.write_text(f"{e}\n")
        return f"{job.name}: diverged, {e}"
    finally:
        torch.set_num_threads(threads)
    best = result.history[result.best_epoch]
    seconds = result.manifest["seconds"]["fit"]
    return (
        f"{job.name}: loss {best['validation_loss']:.6f}, LogMAE {best['validation_logmae']:.4f}, "
        f"epoch {result.best_epoch + 1} of {len(result.history)}, {seconds:.0f} s"
    )
