import pytest
import torch

from moeq.survey.predictor import BlockPredictor, predicted_similarity, token_similarity, train_predictor


def test_similarity_is_the_cosine_of_each_token() -> None:
    before, after = torch.randn(5, 7), torch.randn(5, 7)
    expected = [float(x @ y / (x.norm() * y.norm())) for x, y in zip(before, after, strict=True)]
    assert token_similarity(before, after).tolist() == pytest.approx(expected, rel=1e-5)
    assert token_similarity(before, 2 * before).tolist() == pytest.approx([1.0] * 5)


def test_the_predictor_is_two_linears_without_bias_and_a_tanh() -> None:
    model, tokens = BlockPredictor(6), torch.randn(3, 6)
    hidden = (tokens @ model.inner.weight.T).clamp_min(0)
    torch.testing.assert_close(model(tokens), torch.tanh(hidden @ model.outer.weight.T)[:, 0])
    assert hidden.shape[1] == 1024
    assert sum(parameter.numel() for parameter in model.parameters()) == 6 * 1024 + 1024


def test_training_learns_a_similarity_that_depends_on_the_token_and_is_seeded() -> None:
    tokens = list(torch.randn(20, 16, 8))
    similarities = [torch.tanh(sequence[:, 0]) for sequence in tokens]
    first, second = (train_predictor(tokens, similarities, seed=3) for _ in range(2))
    torch.testing.assert_close(first.outer.weight, second.outer.weight, rtol=0, atol=0)
    unseen = torch.randn(500, 8)
    correlation = torch.corrcoef(torch.stack([first(unseen).detach(), torch.tanh(unseen[:, 0])]))[0, 1]
    assert float(correlation) > 0.8


def test_the_prediction_is_summed_over_all_tokens() -> None:
    model, tokens = BlockPredictor(4), [torch.randn(3, 4), torch.randn(5, 4)]
    total, num_tokens = predicted_similarity(model, tokens)
    assert num_tokens == 8
    assert total == pytest.approx(float(model(torch.cat(tokens)).detach().sum()), rel=1e-5)


def test_one_sequence_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least 2 sequences"):
        train_predictor([torch.randn(3, 4)], [torch.zeros(3)])
