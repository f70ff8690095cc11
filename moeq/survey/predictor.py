"""Block importance predictor (QuantMoE-Bench, arXiv 2406.08155): how much an FFN changes its tokens, and a model of it.

    similarity = mean over tokens of cos(x, y),     x and y the token before and after the FFN

Blocks with a low similarity change their tokens much and get more bits.  The predictor of a block is

    tanh(w2 . relu(W1 x)),     W1 [1024, D], w2 [1024], no biases

trained on (x, cos(x, y)) with the squared error: AdamW, learning rate 1e-4, weight decay 1e-2, one sequence per step,
at most 100 epochs, a tenth of the sequences for validation, stopped after 5 epochs without improvement; the weights of
the best epoch are kept.  The paper trains in bfloat16, this in float32.

Shapes: T tokens of one sequence, D width.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

HIDDEN = 1024
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-2
MAX_EPOCHS, PATIENCE = 100, 5
VALIDATION_SHARE = 0.1


def token_similarity(before_TD: Tensor, after_TD: Tensor) -> Tensor:
    """Cosine similarity of each token with itself after the FFN, float32 [T]; 0 for a token of zeros."""
    return functional.cosine_similarity(before_TD.float(), after_TD.float(), dim=-1)


class BlockPredictor(nn.Module):
    """Predicts the similarity of a token from the token alone.

    Args:
        width: D.
        seed: Of the initial weights (those of ``nn.Linear``: uniform within 1 / sqrt(in features)).
    """

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        self.inner = nn.Linear(width, HIDDEN, bias=False)
        self.outer = nn.Linear(HIDDEN, 1, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for linear in (self.inner, self.outer):
                bound = linear.in_features**-0.5
                linear.weight.copy_((2 * torch.rand(linear.weight.shape, generator=generator) - 1) * bound)

    def forward(self, tokens_TD: Tensor) -> Tensor:
        """Predicted similarity of each token, float32 [T], between -1 and 1."""
        predicted: Tensor = torch.tanh(self.outer(torch.relu(self.inner(tokens_TD.float()))))
        return predicted.squeeze(-1)


def train_predictor(
    tokens: Sequence[Tensor], similarities: Sequence[Tensor], seed: int = 0, device: torch.device | str = "cpu"
) -> BlockPredictor:
    """Train the predictor of one block.

    Args:
        tokens: Tokens before the FFN, [T, D] for each sequence, any float dtype.
        similarities: ``token_similarity`` of each sequence.
        seed: Of the weights, of the split and of the order of the sequences.
        device: Where to train.

    Raises:
        ValueError: Fewer than two sequences: one is needed for validation.
    """
    if len(tokens) < 2:
        raise ValueError(f"the predictor needs at least 2 sequences, not {len(tokens)}; one of them is for validation")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(tokens), generator=generator).tolist()
    num_validation = max(1, round(VALIDATION_SHARE * len(tokens)))
    validation, training = order[:num_validation], order[num_validation:]
    model = BlockPredictor(tokens[0].shape[1], seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best_loss, best_state, num_waited = float("inf"), copy.deepcopy(model.state_dict()), 0
    for _ in range(MAX_EPOCHS):
        with torch.enable_grad():
            for position in torch.randperm(len(training), generator=generator).tolist():
                _loss(model, tokens, similarities, training[position], device).backward()
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            loss = sum(float(_loss(model, tokens, similarities, index, device)) for index in validation)
        if loss < best_loss:
            best_loss, best_state, num_waited = loss, copy.deepcopy(model.state_dict()), 0
        elif (num_waited := num_waited + 1) >= PATIENCE:
            break
    model.load_state_dict(best_state)
    return model


@torch.no_grad()
def predicted_similarity(model: BlockPredictor, tokens: Sequence[Tensor]) -> tuple[float, int]:
    """Sum of the predictions over all tokens, and the number of tokens."""
    device = model.inner.weight.device
    sums = [float(model(tokens_TD.to(device)).double().sum()) for tokens_TD in tokens]
    return sum(sums), sum(len(tokens_TD) for tokens_TD in tokens)


def _loss(
    model: BlockPredictor,
    tokens: Sequence[Tensor],
    similarities: Sequence[Tensor],
    index: int,
    device: torch.device | str,
) -> Tensor:
    target_T = similarities[index].to(device)
    return functional.mse_loss(model(tokens[index].to(device)), target_T)
