"""The parts that the training stages are made of: schedules, masks, losses, batches, options."""

import numpy as np
import pytest
import torch

from gqsac.compress import losses
from gqsac.compress.choose_masks import MaskChooser
from gqsac.compress.clock import Clock, learning_rate_factor
from gqsac.compress.end_to_end import batch_rows
from gqsac.compress.fake_quant import GroupLinear
from gqsac.compress.losses import relative_error, token_loss
from gqsac.compress.options import Options, checked
from gqsac.compress.select import protect_2_of_4, protect_rows, scheduled_sparsity, select_globally, select_groups
from gqsac.compress.sensitivity import group_scores
from gqsac.errors import InputError


def test_the_schedule_rises_from_nothing_to_exactly_the_target():
    points = [scheduled_sparsity(0.5, t / 20, 0.5) for t in range(21)]
    assert points[0] == 0
    assert points == sorted(points)
    assert points[10:] == [0.5] * 11
    assert points[5] == pytest.approx(0.5 * 7 / 8)


def test_a_mask_of_two_in_four_grows_to_exactly_two_in_four():
    saliency = torch.rand(6, 32, generator=torch.Generator().manual_seed(0))
    for sparsity in (0.0, 0.2, 0.4, 0.5):
        keep = select_groups(protect_2_of_4(saliency), sparsity)
        assert (~keep).sum() == round(sparsity * keep.numel())
        assert (keep.view(-1, 4).sum(1) >= 2).all()
    best = torch.zeros(6, 8, 4, dtype=torch.bool).scatter_(2, saliency.view(6, 8, 4).topk(2, dim=2).indices, True)
    assert torch.equal(keep, best.view(6, 32))


def test_a_global_budget_is_met_exactly_and_spares_every_row():
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(4, 10, generator=generator), "b": 100 * torch.rand(3, 8, generator=generator)}
    keeps = select_globally({name: protect_rows(score, 0.1) for name, score in scores.items()}, 0.5)
    assert sum(int((~keep).sum()) for keep in keeps.values()) == 32
    assert (keeps["a"].sum(1) == 1).all() and (~keeps["b"]).sum() == 0 or (~keeps["a"]).sum() > 0.8 * 36
    assert all((keep.sum(1) >= 1).all() for keep in keeps.values())


def test_mask_chooser_removes_what_costs_least_and_reaches_the_target():
    linears = {}
    for name, rows in (("a", 8), ("b", 4)):
        weight = torch.ones(rows, 64)
        keep = torch.ones(rows, 4, dtype=torch.bool)
        row_bits = torch.full((rows,), 4, dtype=torch.uint8)
        linears[name] = GroupLinear(row_bits, weight, torch.full((rows, 4), 0.1), torch.full((rows, 4), 8), keep, None)
        linears[name].weight.grad = torch.arange(4.0).repeat_interleave(16).expand(rows, 64).clone()
    chooser = MaskChooser(linears, checked(Options(sparsity=0.25)), already_sparse=False)
    chooser.observe()
    removed = []
    for step in range(101):
        chooser.step(step, step / 100)
        removed.append(sum(int((~keep).sum()) for keep in chooser.keeps().values()))
    assert removed[0] == 0 and removed == sorted(removed) and len(set(removed)) > 3
    assert removed[-1] == 12 and not chooser.unfinished
    assert all(not keep[:, 0].any() and keep[:, 1:].all() for keep in chooser.keeps().values())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_token_loss_and_its_gradient_are_those_of_torch(monkeypatch, share):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 64)  # several chunks
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 20, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 7, 20, generator=generator)
    tokens = torch.randint(0, 20, (2, 7), generator=generator)
    log_q = torch.log_softmax(logits[:, :-1], -1).flatten(0, 1)
    log_p = torch.log_softmax(teacher[:, :-1], -1).flatten(0, 1)
    expected = (1 - share) * torch.nn.functional.nll_loss(log_q, tokens[:, 1:].flatten())
    expected = expected + share * torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    loss, gradient = token_loss(logits, tokens, teacher, share, factor=2)
    torch.testing.assert_close(loss, 2 * expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(2 * expected, logits)[0])


def test_relative_error_is_blind_to_a_tokens_norm():
    target = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    output = target * 1.1
    sink = torch.ones(1, 5, 1)
    sink[0, 2] = 571
    torch.testing.assert_close(relative_error(output, target), torch.tensor(0.01))
    torch.testing.assert_close(relative_error(output * sink, target * sink), torch.tensor(0.01))


def test_batches_go_through_all_samples_in_each_epoch():
    rows = np.concatenate([batch_rows(10, 4, step, seed=3) for step in range(10)])
    for epoch in range(4):
        assert sorted(rows[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert not np.array_equal(rows[:10], rows[10:20])
    assert np.array_equal(batch_rows(10, 4, 7, seed=3), rows[28:32])  # a function of the step alone


def test_clock_and_learning_rate():
    clock = Clock(steps=10, seconds=None)
    assert [clock.fraction(step) for step in (0, 5, 10, 11)] == [0, 0.5, 1, 1]
    assert Clock(steps=10, seconds=1.0, spent_s=0.9).fraction(1) >= 0.9
    assert Clock(steps=None, seconds=1.0, spent_s=2.0).fraction(0) == 1
    with pytest.raises(ValueError):
        Clock(None, None)
    factors = [learning_rate_factor(t / 100) for t in range(101)]
    assert 0 < factors[0] < 0.2 and max(factors) == 1 and factors[-1] == pytest.approx(0.05)


def test_sensitivity_is_the_squared_gradient_of_removing_a_group():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.embed = torch.nn.Embedding.from_pretrained(torch.randn(9, 16, generator=generator))
            self.linear = torch.nn.Linear(16, 9, bias=False)
            self.linear.weight.data = torch.randn(9, 16, generator=generator)

        def forward(self, tokens, use_cache):
            return type("Output", (), {"logits": self.linear(self.embed(tokens))})

    model = Model()
    tokens = torch.randint(0, 9, (3, 6), generator=torch.Generator().manual_seed(1))
    scores = group_scores(model, ["linear"], tokens, 8)["linear"]
    weight = model.linear.weight.detach()
    expected = torch.zeros(9, 2)
    for row in tokens:

        def loss_at(scale, row=row):
            logits = torch.nn.functional.linear(model.embed(row[None]), weight * scale.repeat_interleave(8, 1))
            return torch.nn.functional.cross_entropy(logits[0, :-1], row[1:])

        scale = torch.ones(9, 2, requires_grad=True)
        expected += torch.autograd.grad(loss_at(scale), scale)[0].square() / 3
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stages": ("distil",)}, "stage 'distil' is unknown"),
        ({"stages": ("distill", "bqpo")}, "out of order"),
        ({"stages": ("bqpo", "bqpo")}, "out of order"),
        ({"quant_group_size": 24}, "quantisation group size is 24, expected a multiple of the group size 16"),
        ({"pattern": "4:8"}, "pattern is '4:8'"),
        ({"pattern": "2:4", "sparsity": 0.3}, "removes exactly 0.5"),
        ({"pattern": "2:4", "allocation": "global"}, "leaves no choice"),
        ({"epochs": 0}, "epochs is 0"),
        ({"minutes": 0}, "minutes is 0"),
        ({"minutes": (1, 2), "stages": ("bqpo",)}, "minutes has 2 values, expected one, .* 1 training stages"),
        ({"e2e_steps": (5, 5), "stages": ("bqpo", "distill")}, "e2e_steps has 2 values, .* 1 end-to-end stages"),
        ({"e2e_steps": (5, 0), "stages": ("distill", "e2e-oqp")}, "e2e_steps is 0"),
        ({"minutes": float("inf")}, "minutes is inf"),
        ({"weight_lr": -1}, "weight_lr is -1"),
        ({"distill": 1.5}, "distill is 1.5"),
    ],
)
def test_training_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        checked(Options(**options))


@pytest.mark.parametrize(
    "options, rate",
    [
        ({"sparsity": 0.0}, 1.5e-3),
        ({"sparsity": 0.1}, 3e-3),
        ({"sparsity": 0.0, "bits": 3}, 3e-3),
        ({"sparsity": 0.3}, 6e-3),
        ({"sparsity": 0.0, "bits": 2}, 6e-3),
        ({"sparsity": 0.5}, 8e-3),
        ({"pattern": "2:4"}, 8e-3),
        ({"sparsity": 0.5, "weight_lr": 1e-4}, 1e-4),
    ],
)
def test_weights_learn_the_faster_in_distill_the_more_was_lost(options, rate):
    chosen = checked(Options(stages=("distill", "e2e-oqp"), **options))
    assert chosen.rates("distill")[0] == pytest.approx(rate)
    assert chosen.rates("e2e-oqp")[0] == 0
