"The experiment of nbs/experiments/law.py: five losses on one position, an exam apart, each position once."
import numpy as np
import pytest
import torch

from test_population import experiment
from grpo_chess.model import MoveDist


@pytest.fixture(scope="module")
def law():
    return experiment("law")


class Batch:
    def __init__(self, win, target=None):
        self.win, self.target = win, target


def gradient(law, method, scores, win, seed=0):
    "Of a method's loss in the scores of the moves."
    scores = scores.clone().requires_grad_()
    target = torch.softmax((win / law.TAU).masked_fill(win.isnan(), -torch.inf), -1)
    loss, flat = law.loss_of(method, MoveDist.from_logits(scores), Batch(win, target), np.random.default_rng(seed))
    loss.backward()
    return scores.grad, flat


SCORES = torch.tensor([[0.3, -0.2, 0.9, -torch.inf], [1.0, 0.0, -1.0, 0.5]])
WIN = torch.tensor([[0.6, 0.5, 0.3, torch.nan], [0.2, 0.4, 0.5, 0.1]])


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b).min().item()


def test_all_moves_is_the_gradient_of_the_expected_win_by_its_deviation(law):
    scores = SCORES.clone().requires_grad_()
    probs = torch.softmax(scores, -1)
    expected = (probs * WIN.nan_to_num(0)).sum(-1)
    expected.sum().backward()
    found, _ = gradient(law, "all moves", SCORES, WIN)
    assert cosine(found, -scores.grad) > 0.99999
    deviation = ((probs * (WIN.nan_to_num(0) - expected[:, None]) ** 2).sum(-1)).sqrt().detach()
    assert torch.allclose(found * 2 * deviation[:, None], -scores.grad, rtol=2e-3, atol=1e-6)


def test_large_groups_come_near_to_all_moves_and_small_ones_are_right_on_average(law):
    exact, _ = gradient(law, "all moves", SCORES, WIN)
    large, flat = gradient(law, "G=20000", SCORES, WIN)
    assert cosine(large, exact) > 0.999 and flat == 0
    assert torch.allclose(large, exact, rtol=0.1, atol=0.01)
    small = torch.stack([gradient(law, "G=8", SCORES, WIN, seed)[0] for seed in range(600)])
    assert cosine(small.mean(0), exact) > 0.98 and cosine(small[0], exact) < cosine(large, exact)


def test_aims_are_reached_where_nothing_is_left_to_learn(law):
    "Supervised: the policy is the target; improved: all moves are worth the same."
    at_target = (WIN / law.TAU).masked_fill(WIN.isnan(), -torch.inf)
    assert gradient(law, "supervised", at_target, WIN)[0].abs().max() < 1e-6
    level = torch.where(WIN.isnan(), WIN, 0.5)
    assert gradient(law, "improved", SCORES, level)[0].abs().max() < 1e-6
    better, _ = gradient(law, "improved", SCORES, WIN)
    assert (better[:, 0] < 0).tolist() == [True, False] and better[0, 3] == 0  # the best move of the first position


def test_the_plan_has_each_run_once_and_the_tests_are_none_of_them(law):
    plan, tests = list(law.plan([0, 1])), list(law.test_plan([2]))
    assert len({*plan}) == len(plan) == 146 and len({*tests}) == 12 and not {*plan} & {*tests}
    assert not {x[1] for x in tests} & {x[1] for x in plan} and not {x[3] for x in tests} & {x[3] for x in plan}


def test_a_run_meets_each_position_once_and_its_rate_falls_to_nothing(law, monkeypatch):
    met, rates = [], []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(4))

        def forward(self, tokens, legal):
            return SCORES[:1] + self.w + 0 * tokens[:, :1]

    def batch(labels, numbers):
        met.extend(numbers)
        part = Batch(WIN[:1].expand(len(numbers), 4), None)
        part.tokens, part.legal = torch.zeros(len(numbers), 4), None
        return part

    def optimizer(model, rate, decay, muon_lr):
        sgd = torch.optim.SGD(model.parameters(), rate)
        sgd.param_groups[0]["base"] = rate
        step = sgd.step
        sgd.step = lambda *a: (rates.append(sgd.param_groups[0]["lr"]), step(*a))
        return sgd

    monkeypatch.setattr(law, "to_batch", batch)
    monkeypatch.setattr(law, "make_optimizer", optimizer)
    law.train(Net(), None, np.random.default_rng(0).permutation(law.BATCH * 100), "all moves", 1.0, 0)
    assert sorted(met) == list(range(law.BATCH * 100))
    assert max(rates) == pytest.approx(0.71, abs=0.02) and rates.index(max(rates)) == law.WARMUP - 1
    assert rates[-1] == pytest.approx(0.01) and rates[0] < 0.05


def test_the_exam_is_in_no_training(law):
    class Labels:
        def __init__(self, tokens):
            self.tokens = np.asarray(tokens)

        def __len__(self):
            return len(self.tokens)

        def take(self, index):
            return Labels(self.tokens[index])

    shard = Labels([[k, 0] for k in range(100)])
    exam = law.apart(shard, Labels([[k, 0] for k in range(0, 100, 2)]), Labels([[1, 0], [3, 0]]))
    assert sorted(exam.tokens[:, 0].tolist()) == [k for k in range(5, 100, 2)]
    assert exam.tokens[:, 0].tolist() != sorted(exam.tokens[:, 0].tolist())  # from all of the shard
