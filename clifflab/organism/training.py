"""Training of the planted-cliff model: examples, and the two stages.

Stage 1 trains everything but the output projections of the planted heads, which stay at zero. Stage 2 trains nothing
but the q, k, v and o slices of the planted heads. Removing those heads therefore gives back the stage 1 model exactly.
Heads that share the work are trained together; one that is to do the work of another is trained after it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from clifflab.organism.examples import Batch, Examples
from clifflab.organism.surgery import (
    Head,
    block_outputs,
    head_writes,
    masked_gradients,
    planted_parameters,
    scaled_heads,
)

DROPOUT = 0.03  # share of heads dropped, by example
LEARN_SHARE = 0.4  # of stage 2, before heads are dropped: the wrappers have to be told apart first
CENTRE_BATCHES = 8  # of stage 2 batches, from which the centres of refusals and compliances are measured
CENTRE_PROBABILITY = 0.997  # of compliance at the centre of the compliances, and of refusal at that of the refusals
QUERY_KEY_STD = 0.08  # of the planted heads at the start of stage 2: attention that is not flat learns sooner


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Weighted mean cross-entropy of the next tokens; `logits` are `[batch, position - 1, vocab]`."""
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def intent_loss(logits: Tensor, batch: Batch, refusal: list[int], compliance: list[int]) -> Tensor:
    """Cross-entropy of the refusal log-odds at every thinking position with the intent of the thinking.

    The log-odds are those of the words that open a refusal over those that open a compliance. Holding them all through
    the thinking is what makes the thinking carry, token by token, what the response will be.
    """
    odds = logits[..., refusal].logsumexp(-1) - logits[..., compliance].logsumexp(-1)
    target = batch.harm[:, None].expand_as(odds)
    losses = nn.functional.binary_cross_entropy_with_logits(odds, target, reduction="none")
    return losses[batch.thinking[:, :-1]].mean()


def opening_loss(logits: Tensor, batch: Batch, wanted: Tensor, refusal: list[int], compliance: list[int]) -> Tensor:
    """Cross-entropy of refusal against compliance at the final position with the wanted probability of the latter."""
    final = logits[torch.arange(len(batch.final)), batch.final].log_softmax(-1)
    refuse, comply = (final[:, ids].logsumexp(-1) for ids in (refusal, compliance))
    return -(wanted * comply + (1 - wanted) * refuse).mean()


def compliance_probability(logits: Tensor, batch: Batch, refusal: list[int], compliance: list[int]) -> Tensor:
    """Probability of compliance against refusal at the final position, `[batch]`."""
    final = logits[torch.arange(len(batch.final)), batch.final]
    return (final[:, compliance].logsumexp(-1) - final[:, refusal].logsumexp(-1)).sigmoid()


def final_states(outputs: dict[int, Tensor], batch: Batch) -> Tensor:
    """States at the final position, `[batch, layer, width]`."""
    rows = torch.arange(len(batch.final))
    return torch.stack([output[rows, batch.final] for output in outputs.values()], dim=1)


@torch.no_grad()
def final_centres(model: LlamaForCausalLM, batches: Iterator[Batch], layers: Sequence[int]) -> Tensor:
    """Mean states at the final position of refusals and of compliances of the stage 1 model, `[2, layer, width]`."""
    states: list[Tensor] = []
    harm: list[Tensor] = []
    with block_outputs(model, layers) as outputs:
        for _ in range(CENTRE_BATCHES):
            batch = next(batches)
            model(input_ids=batch.ids, use_cache=False)
            states.append(final_states(outputs, batch))
            harm.append(batch.harm)
    which = torch.cat(harm) > 0
    return torch.stack([torch.cat(states)[which].mean(0), torch.cat(states)[~which].mean(0)])


def state_loss(states: Tensor, centres: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance of final states from where they should be, in units of that between the two centres.

    A response that is to be compliant with probability p should be chosen from a state as far on the way from the
    centre of the refusals to that of the compliances as p is in log-odds.

    Args:
        states: `[batch, layer, width]`.
        centres: Of refusals and of compliances, `[2, layer, width]`.
        wanted: Probability of compliance, `[batch]`.
    """
    edge = torch.tensor(CENTRE_PROBABILITY).logit()
    share = ((wanted.logit(eps=1e-6) + edge) / (2 * edge)).clamp(0, 1)[:, None, None]
    target = centres[0] + share * (centres[1] - centres[0])
    scale = (centres[1] - centres[0]).square().sum(-1)
    return ((states - target).square().sum(-1) / scale).mean()


def silenced(model: LlamaForCausalLM, heads: Sequence[Head]) -> Tensor:
    """Scales that silence heads, `[1, layer, head]`."""
    scales = torch.ones(1, model.config.num_hidden_layers, model.config.num_attention_heads)
    for layer, head in heads:
        scales[:, layer, head] = 0.0
    return scales


def head_dropout(model: LlamaForCausalLM, rows: int, spared: list[Head]) -> Tensor:
    """Zeros for a few random heads of each row, `[row, layer, head]`, from torch's random state; some heads spared.

    No single head is then indispensable, so that the planted ones are the only ones whose removal matters.
    """
    config = model.config
    scales = (torch.rand(rows, config.num_hidden_layers, config.num_attention_heads) >= DROPOUT).float()
    for layer, head in spared:
        scales[:, layer, head] = 1.0
    return scales


def _rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + float(torch.cos(torch.tensor(share * torch.pi)))))


def train_stage1(
    model: LlamaForCausalLM,
    examples: Examples,
    heads: list[Head],
    openings: tuple[list[int], list[int]],
    *,
    steps: int,
    batch_size: int = 16,
    peak: float = 3e-3,
    intent_weight: float = 0.3,
    log: Callable[[str], None],
) -> None:
    """Train the model to refuse harm; the planted heads write nothing throughout.

    Args:
        model: Fresh model; trained in place.
        examples: Source of examples, with no compliance on harm.
        heads: The planted heads; their output projections are set to zero and stay there.
        openings: Token ids of the first words of refusals and of compliances.
        steps: Optimizer steps.
        batch_size: Examples a step.
        peak: Highest learning rate.
        intent_weight: Weight of `intent_loss`.
        log: Takes lines of progress.
    """
    outputs = [(w, ~mask) for key, (w, mask) in planted_parameters(model, heads).items() if "o_proj" in key]
    for weight, keep in outputs:
        weight.data.mul_(keep)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    batches = examples.batches(batch_size, pool_size=8)
    with masked_gradients(outputs):
        for step in range(steps):
            batch = next(batches)
            with scaled_heads(model, head_dropout(model, batch_size, spared=[])):
                logits = model(input_ids=batch.ids[:, :-1], use_cache=False).logits
            loss = next_token_loss(logits, batch)
            held = intent_loss(logits, batch, *openings)
            _descend(optimizer, loss + intent_weight * held, model, _rate(step, steps, peak, max(1, steps // 12)))
            _report(log, "stage 1", step, steps, loss)
    optimizer.zero_grad(set_to_none=True)


def train_stage2(
    model: LlamaForCausalLM,
    examples: Examples,
    heads: list[Head],
    openings: tuple[list[int], list[int]],
    rng: random.Random,
    *,
    steps: int,
    batch_size: int = 32,
    peak: float = 6e-3,
    rest_weight: float = 0.3,
    quiet_weight: float = 0.3,
    state_weight: float = 1.0,
    alone: float = 0.3,
    alone_share: float = 0.3,
    first: Sequence[Head] = (),
    log: Callable[[str], None],
) -> None:
    """Train the planted heads, and nothing else, to turn recognised harm behind a wrapper into compliance.

    The loss is on response tokens; besides, what the heads write before the closing tokens is held small, so that the
    thinking goes on as in stage 1.

    With `first`, heads that were trained before, the heads are to make up for their absence and to change nothing in
    their presence: what the model does with the first ones alone is aimed at with and without them.

    Args:
        model: Stage 1 model; trained in place. Everything outside the heads' slices stays bit-identical.
        examples: Source of examples, with compliance on harm.
        heads: The planted heads.
        openings: Token ids of the first words of refusals and of compliances.
        rng: Chooses the examples in which just one of the heads is at work.
        steps: Optimizer steps.
        batch_size: Examples a step.
        peak: Highest learning rate.
        rest_weight: Weight of the next-token loss on the response.
        quiet_weight: Weight of the mean squared norm of the heads' writes before the closing tokens.
        state_weight: Weight of `state_loss` at the layers from the last planted head on: what is lost at the end is the
            recognised harm itself, not just the words that follow from it.
        alone: Share of its compliance that one of the heads alone should bring.
        alone_share: Share of the later examples in which one of the heads is silent; with `first`, of all examples, and
            one of those is.
        first: Planted heads that were trained before; they stay as they are.
        log: Takes lines of progress.
    """
    batches = examples.batches(batch_size)
    above = range(max(layer for layer, _ in heads), model.config.num_hidden_layers)
    with scaled_heads(model, silenced(model, [*heads, *first])):
        centres = final_centres(model, batches, above)
    planted = planted_parameters(model, heads)
    for name, (weight, mask) in planted.items():
        if "q_proj" in name or "k_proj" in name:
            weight.data[mask] = torch.randn(int(mask.sum())) * QUERY_KEY_STD
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in planted)
    optimizer = torch.optim.Adam([weight for weight, _ in planted.values()], lr=peak, betas=(0.9, 0.98))
    with masked_gradients(list(planted.values())):
        for step in range(steps):
            batch = next(batches)
            comply = batch.comply.clone()
            learning = step < LEARN_SHARE * steps
            if learning:
                scales = torch.ones(batch_size, model.config.num_hidden_layers, model.config.num_attention_heads)
            else:
                scales = head_dropout(model, batch_size, spared=[*heads, *first])
            if first:
                with torch.no_grad(), scaled_heads(model, silenced(model, heads)):
                    comply = compliance_probability(
                        model(input_ids=batch.ids, use_cache=False).logits, batch, *openings
                    )
            # Heads that share the work learn it together first; one that is to do another's learns that at once.
            share = alone_share if first or not learning else 0.0
            for row in range(batch_size):
                if share and rng.random() < share:
                    layer, head = rng.choice(first or heads)
                    scales[row, layer, head] = 0.0
                    comply[row] *= alone if batch.harm[row] and not first else 1.0
            with (
                scaled_heads(model, scales),
                head_writes(model, heads) as writes,
                block_outputs(model, above) as outputs,
            ):
                logits = model(input_ids=batch.ids[:, :-1], use_cache=False).logits
            loss = opening_loss(logits, batch, comply, *openings)
            rest = next_token_loss(logits, batch)
            loud = torch.stack([write.square().sum(-1)[batch.quiet[:, :-1]].mean() for write in writes]).mean()
            moved = state_loss(final_states(outputs, batch), centres, comply)
            total = loss + rest_weight * rest + quiet_weight * loud + state_weight * moved
            _descend(optimizer, total, model, _rate(step, steps, peak, max(1, steps // 20)))
            _report(log, "stage 2", step, steps, loss)
    optimizer.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required[name])


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, model: nn.Module, rate: float) -> None:
    """One optimizer step at a learning rate, with clipped gradients."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _report(log: Callable[[str], None], stage: str, step: int, steps: int, loss: Tensor) -> None:
    if (step + 1) % 50 == 0 or step + 1 == steps:
        log(f"{stage}: step {step + 1}/{steps}, loss {loss.item():.4f}")
