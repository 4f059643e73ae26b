"""finetune --method NAME for methods with an optimiser, a schedule or a support of their own: stopped and resumed as never stopped."""

import pytest
import torch

from peftfast.__main__ import main
from tests.test_cli_finetune import command, environment, llama, texts  # noqa: F401
from tests.test_cli_finetune_named import tensors
from tests.test_cli_finetune_resume import stopped_at

STEPS = ("--max-steps", "8", "--save-steps", "2", "--learning_rate", "1e-2")
METHODS = {
    "galore": ("rank=4", "update_interval=3"),
    "id3": ("every=2",),
    "lisa": ("active=1", "interval=3"),
    "sara": ("rank_weight=0.01",),
}


@pytest.mark.parametrize("method", METHODS)
def test_resumed_is_as_never_stopped(llama, texts, tmp_path, monkeypatch, method):  # noqa: F811
    through, out = tmp_path / "through", tmp_path / "out"
    given = [word for one in METHODS[method] for word in ("--method-option", one)]
    assert main(command(llama, texts, through, *STEPS, "--method", method, *given)) == 0
    argv = command(llama, texts, out, *STEPS, "--method", method, *given)
    stopped_at(4, monkeypatch, argv)
    assert main([*argv, "--resume"]) == 0
    first, second = tensors(through), tensors(out)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
