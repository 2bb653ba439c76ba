"""The process that makes the batches."""

import multiprocessing

import pytest
from torch.utils.data import IterableDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from slr_core.training.loader import BatchLoader
from slr_core.training.trainer import train
from tests.training.recipe import recipe


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(100))


def test_the_process_ends_when_the_loader_is_closed():
    others = set(multiprocessing.active_children())  # of other tests
    loader = BatchLoader(Numbers(), str)
    loader.close()  # nothing was read: there is none yet
    batches = iter(loader)
    assert [next(batches), next(batches)] == ["0", "1"]
    assert set(multiprocessing.active_children()) - others
    loader.close()
    assert not set(multiprocessing.active_children()) - others


def test_an_interrupt_while_the_process_ends_is_not_dropped(tmp_path, monkeypatch):
    shut_down = _MultiProcessingDataLoaderIter._shutdown_workers

    def interrupted(iterator):
        is_first = not iterator._shutdown
        shut_down(iterator)
        if is_first:
            raise KeyboardInterrupt

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(output_dir=tmp_path / "out"))
    assert not (tmp_path / "out/training.json").exists()
