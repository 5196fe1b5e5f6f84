"""Models that nothing is wrong with are taken, each as what it is, without a word."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distsampler.chains.worker import Inspect, Worker
from distsampler.models.loss import LossKind
from distsampler.sampling.prepare import draft
from tests.models import architectures as of
from tests.models.test_inspection import state_of
from tests.problems import config

CPU = torch.device("cpu")
MEAN = LossKind(per_example=False)
DRAWING = LossKind(stochastic=True)
NORMED = LossKind(moves_buffers=True)
BY_BATCH = "(batch norm does that)"


@dataclass
class Case:
    model: Any
    data: Any
    loss: Any
    kind: LossKind = field(default_factory=LossKind)
    note: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


TRAIN = {"mode": "train"}
CASES = {
    "LeNet": Case(of.lenet, of.IMAGES, of.entropy),
    "LeNet, mean": Case(of.lenet, of.IMAGES, of.mean_entropy, MEAN),
    "VGG": Case(of.vgg, of.IMAGES, of.entropy),
    "VGG with dropout": Case(of.vgg, of.IMAGES, of.entropy, DRAWING, fields=TRAIN),
    "ResNet": Case(of.resnet, of.IMAGES, of.entropy),
    "ResNet, normed by batch": Case(of.resnet, of.IMAGES, of.entropy, NORMED, BY_BATCH, TRAIN),
    "ResNet, normed by batch, mean": Case(of.resnet, of.IMAGES, of.mean_entropy, NORMED._replace(per_example=False), BY_BATCH, TRAIN),
    "ResNet in bfloat16": Case(of.resnet, of.IMAGES, of.mean_entropy, MEAN, fields={"precision": "bf16"}),
    "ResNet with group norm": Case(of.grouped, of.IMAGES, of.entropy, fields=TRAIN),
    "MobileNet": Case(of.mobilenet, of.IMAGES, of.entropy),
    "MobileNet, normed by batch": Case(of.mobilenet, of.IMAGES, of.entropy, NORMED, BY_BATCH, TRAIN),
    "DenseNet": Case(of.Dense, of.IMAGES, of.entropy),
    "U-Net": Case(of.Unet, of.MASKS, of.of_pixels),
    "U-Net, mean": Case(of.Unet, of.MASKS, of.mean_of_pixels, MEAN),
    "ViT": Case(of.Vit, of.IMAGES, of.entropy),
    "ViT with dropout": Case(of.Vit, of.IMAGES, of.entropy, DRAWING, fields=TRAIN),
    "RNN": Case(lambda: of.Recurrent(nn.RNN), of.TOKENS, of.predicted),
    "LSTM": Case(of.Recurrent, of.TOKENS, of.predicted),
    "GRU": Case(lambda: of.Recurrent(nn.GRU), of.TOKENS, of.mean_predicted, MEAN),
    "CTC": Case(of.Recurrent, of.TOKENS, of.spelled),
    "encoder": Case(of.Encoder, of.TOKENS, of.predicted),
    "encoder with dropout": Case(of.Encoder, of.TOKENS, of.mean_predicted, DRAWING._replace(per_example=False), fields=TRAIN),
    "encoder with padding": Case(of.Nested, (of.PADDED, of.LABELS), of.entropy),
    "mean over tokens that count": Case(of.Encoder, of.PADDED, of.counted, MEAN._replace(coupled=True), "examples weigh differently"),
    "tied embeddings": Case(lambda: of.Encoder(tied=True), of.TOKENS, of.predicted),
    "kept angles": Case(of.Attention, of.TOKENS, of.predicted),
    "checkpointed, reentrant": Case(lambda: of.Attention(True), of.TOKENS, of.predicted),
    "checkpointed": Case(lambda: of.Attention(False), of.TOKENS, of.predicted),
    "experts": Case(of.Experts, of.TOKENS, lambda m, b: of.predicted(m, b) + 0.01 * m.balance),
    "LoRA": Case(of.lora, of.VECTORS, of.entropy),
    "LoRA with dropout": Case(of.lora, of.VECTORS, of.entropy, DRAWING, fields=TRAIN),
    "weight norm": Case(of.weight_norm, of.VECTORS, of.entropy),
    "weight norm, old": Case(of.old_weight_norm, of.VECTORS, of.entropy),
    "spectral norm": Case(of.spectral_norm, of.VECTORS, of.entropy),
    "spectral norm, old": Case(of.old_spectral_norm, of.VECTORS, of.entropy),
    "pruned": Case(of.pruned, of.VECTORS, of.entropy),
    "autoencoder": Case(of.Autoencoder, of.VECTORS, of.rebuilt),
    "variational autoencoder": Case(of.Variational, of.VECTORS, of.bound, DRAWING),
    "complex within": Case(of.Spectral, of.VECTORS, of.entropy),
    "what grows with every call": Case(of.Growing, of.VECTORS, of.entropy, LossKind(moves_attributes=True), "it is put back after each"),
    "torch.func": Case(of.mlp, of.VECTORS, of.vmapped),
    "focal loss": Case(of.mlp, of.VECTORS, of.focal),
    "hinge loss": Case(of.mlp, of.VECTORS, of.hinge),
    "losses of zero": Case(of.mlp, of.VECTORS, of.sharpened),
    "a perfect fit": Case(lambda: copy.deepcopy(of.TEACHER), of.VECTORS, of.learnt, MEAN),
    "tiny losses": Case(of.mlp, of.VECTORS, of.times(1e-12), MEAN),
    "huge losses": Case(of.mlp, of.VECTORS, of.times(1e12), MEAN),
    "one number": Case(of.alone, of.VECTORS, of.scaled),
    "float64": Case(lambda: of.mlp().double(), (of.VECTORS[0].double(), of.LABELS), of.mean_entropy, MEAN),
    "bfloat16": Case(lambda: of.mlp().bfloat16(), (of.VECTORS[0].bfloat16(), of.LABELS), of.mean_entropy, MEAN),
    "bfloat16 within the loss": Case(of.mlp, of.VECTORS, of.in_half, MEAN),
    "two examples, one at a time": Case(of.mlp, tuple(each[:2] for each in of.VECTORS), of.entropy, fields={"batch_size": 1}),
    "three examples": Case(of.mlp, tuple(each[:3] for each in of.VECTORS), of.mean_entropy, MEAN, fields={"batch_size": 2}),
    "microbatches": Case(of.mlp, of.VECTORS, of.mean_entropy, MEAN, fields={"microbatch": 3}),
    "a part that moves": Case(of.mlp, of.VECTORS, of.entropy, fields={"restrict_to": ("2.weight",)}),
}  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors",
    "ignore:enable_nested_tensor",
    "ignore:None of the inputs",
)
@pytest.mark.parametrize("name", CASES)
def test_a_model_that_is_right_is_taken_as_what_it_is_without_a_word(name: str) -> None:
    case, calls = CASES[name], list[int]()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return torch.as_tensor(case.loss(model, batch))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = case.model()
    fields = {"batch_size": 8, "probe": 8, "watch": False, **case.fields}
    before = state_of(model)
    seen: Any = Worker(draft(model, case.data, loss, config(**fields)), CPU).perform(Inspect())
    assert seen.kind == case.kind
    assert len(seen.notes) == bool(case.note), seen.notes
    assert all(case.note in note for note in seen.notes)
    assert state_of(model) == before
    assert len(calls) <= 32
