"""Recurrent states after interrupted steps."""

import torch

from model.cache.pages import PagePool, PageTable
from model.cache.parts import RecurrentPart
from model.cache.recurrent_state import RecurrentState
from model.config import ModelConfig


def test_a_repeated_step_replaces_the_state_of_an_interrupted_one() -> None:
    table = PageTable(PagePool(ModelConfig(), 0), 1)
    state = RecurrentState(table, RecurrentPart((1,)), rewind=1)

    def step(value: float) -> None:
        table.step = 1
        state.append(torch.tensor([[value]]))

    for value in (1.0, 2.0):
        step(value)
        table.advance()
    step(-1.0)  # interrupted: the table does not advance
    step(3.0)
    table.advance()
    assert state.read().item() == 3.0
