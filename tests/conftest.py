"""Shared by all tests: the modules of the repository root, and a model small enough to test."""

import copy
import functools
import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"      # no test asks the network for a model
os.environ["OMP_NUM_THREADS"] = "1"     # before torch is loaded: two workers, a core each
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The bare `python -m pytest` shares all tests between two processes (pytest-xdist).

    Models of this size cannot keep two threads busy, so two workers with a thread each take half
    the time. A call that names a file or a flag runs in one process, where --pdb and -s work.
    """
    if not config.invocation_params.args and not hasattr(config, "workerinput"):
        config.option.numprocesses = 2
        config.option.dist = "worksteal"


@pytest.fixture
def tiny():
    """A Backbone of random weights, fresh for each test: 4 layers of width 32."""
    from backbones import gp_corpus
    return tiny_backbone(gp_corpus)


def tiny_backbone(corpus):
    """A copy of `built_backbone`, for a test to change."""
    import torch
    torch.set_num_threads(1)            # two threads are slower than one at this size
    return copy.deepcopy(built_backbone(corpus))


@functools.cache
def built_backbone(corpus):
    """The model of `tiny`, with the tokenizer of a corpus (backbones/gp_corpus.py, say).

    A new model is nearly uniform and hardly attends to anything, which would hide a wrong position
    or a label one token off. So its matrices are made 8 times larger: every token matters.
    """
    import torch

    import sft
    from backbones.build import build_model, build_tokenizer
    tokenizer = build_tokenizer(corpus.phrases())
    model = build_model(tokenizer, 0, width=32, layers=4, crossing=(1,), heads=2, inner=64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return sft.wrap_backbone(model.eval(), tokenizer)


@pytest.fixture
def seeing(tiny):
    """`tiny` with a picture processor: eyes of random weights that matter to every token."""
    return with_eyes(tiny)


def with_eyes(backbone):
    """The same model, shown pictures."""
    import sft
    from backbones.build import build_processor
    return sft.wrap_backbone(backbone.model, backbone.tokenizer, processor=build_processor(
        backbone.model, backbone.tokenizer))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a saved `tiny`. Tests only read it."""
    import sft
    from backbones import gp_corpus
    return sft.save_checkpoint(tmp_path_factory.mktemp("saved") / "model", tiny_backbone(gp_corpus))
