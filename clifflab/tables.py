"""Arrow schemas of every table that clifflab writes. ``docs/outputs.md`` describes the columns in words.

Tables never hold a time stamp, a host name or a worker's number: two runs of one study write equal tables.
"""

from __future__ import annotations

import pyarrow as pa

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

PROMPTS = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("set", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("messages", MESSAGES),
        ("existing", pa.bool_()),
        ("thinking", pa.string()),
        ("response", pa.string()),
        ("category", pa.string()),
        ("target", pa.string()),
    ]
)

CLUSTERS = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("set", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("cluster", pa.string()),
        ("label_conflict", pa.bool_()),
    ]
)

DUPLICATES = pa.schema(
    [
        ("set_a", pa.string()),
        ("id_a", pa.string()),
        ("group_a", pa.string()),
        ("set_b", pa.string()),
        ("id_b", pa.string()),
        ("group_b", pa.string()),
        ("similarity", pa.float64()),
        ("kind", pa.string()),
        ("label_conflict", pa.bool_()),
        ("joined", pa.bool_()),
    ]
)

TRACES = pa.schema(
    [
        ("row", pa.int64()),
        ("model", pa.string()),
        ("trace_id", pa.string()),
        ("id", pa.string()),
        ("sample", pa.int32()),
        ("set", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("prompt", pa.string()),
        ("thinking", pa.string()),
        ("response", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("prefix_end", pa.int32()),
        ("thinking_start", pa.int32()),
        ("closing_start", pa.int32()),
        ("response_start", pa.int32()),
        ("closed", pa.bool_()),
        ("finish_reason", pa.string()),
        ("source", pa.string()),
    ]
)

OUTCOMES = pa.schema(
    [
        ("row", pa.int64()),
        ("trace_id", pa.string()),
        ("judge", pa.string()),
        ("outcome", pa.string()),
        ("outcome_reason", pa.string()),
    ]
)

GUARD = pa.schema(
    [
        ("row", pa.int64()),
        ("trace_id", pa.string()),
        ("guard", pa.string()),
        ("verdict", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("refused", pa.bool_()),
        ("answer", pa.string()),
        ("cut_tokens", pa.int32()),
    ]
)

REJECTS = pa.schema(
    [
        ("stage", pa.string()),
        ("set", pa.string()),
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("id", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

PROBE_KEY = [("train_positions", pa.string()), ("estimator", pa.string()), ("layer", pa.int32())]

CLIFFS = pa.schema(
    [
        ("row", pa.int64()),
        ("model", pa.string()),
        ("trace_id", pa.string()),
        ("id", pa.string()),
        ("sample", pa.int32()),
        ("set", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("cluster", pa.string()),
        ("split", pa.string()),
        ("outcome", pa.string()),
        *PROBE_KEY,
        ("reported", pa.bool_()),
        ("thinking_tokens", pa.int32()),
        ("closing_tokens", pa.int32()),
        ("plateau", pa.float32()),
        ("plateau_max", pa.float32()),
        ("final", pa.float32()),
        ("cliff", pa.float32()),
        ("misalignment", pa.float32()),
        ("plateau_logit", pa.float32()),
        ("plateau_max_logit", pa.float32()),
        ("final_logit", pa.float32()),
        ("cliff_logit", pa.float32()),
        ("misalignment_logit", pa.float32()),
        ("closing_drops", pa.list_(pa.float32())),
        ("closing_drops_logit", pa.list_(pa.float32())),
    ]
)

# Traces of a corpus on their way to the model: from the tasks of `clifflab score` that read to those that score.
READY = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("prompt", pa.string()),
        ("thinking", pa.string()),
        ("response", pa.string()),
        ("outcome", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("prefix_end", pa.int32()),
        ("thinking_start", pa.int32()),
        ("closing_start", pa.int32()),
        ("response_start", pa.int32()),
        ("cut_tokens", pa.int32()),
        ("finish_reason", pa.string()),
    ]
)

SCORED = pa.schema([*CLIFFS, ("cut_tokens", pa.int32()), ("probe", pa.string())])

SCORE_REJECTS = pa.schema(
    [
        ("row", pa.int64()),
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("id", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

CURVES = pa.schema(
    [
        ("model", pa.string()),
        ("set", pa.string()),
        ("outcome", pa.string()),
        *PROBE_KEY,
        ("reported", pa.bool_()),
        ("axis", pa.string()),
        ("position", pa.int32()),
        ("mean", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n", pa.int64()),
        ("groups", pa.int64()),
    ]
)

SCORES = pa.schema(
    [
        ("row", pa.int64()),
        ("trace_id", pa.string()),
        *PROBE_KEY,
        ("logits", pa.list_(pa.float32())),
    ]
)

BASELINES = pa.schema(
    [
        ("row", pa.int64()),
        ("trace_id", pa.string()),
        ("bag_of_words", pa.float32()),
    ]
)

TRUNCATION = pa.schema(
    [
        ("row", pa.int64()),
        ("model", pa.string()),
        ("trace_id", pa.string()),
        ("id", pa.string()),
        ("sample", pa.int32()),
        ("set", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("kept", pa.float64()),
        ("thinking_tokens", pa.int32()),
        ("response", pa.string()),
        ("outcome", pa.string()),
        ("outcome_reason", pa.string()),
        ("final_all", pa.float32()),
        ("final_final", pa.float32()),
    ]
)

HEADS = pa.schema(
    [
        ("model", pa.string()),
        ("layer", pa.int32()),
        ("head", pa.int32()),
        ("method", pa.string()),
        ("positions", pa.string()),
        ("effect_logit", pa.float64()),
        ("effect_log_odds", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("q", pa.float64()),
        ("rank", pa.int32()),
        ("ranking_logit", pa.float64()),
        ("ranking_log_odds", pa.float64()),
        ("plain_log_odds", pa.float64()),
        ("benign_log_odds", pa.float64()),
        ("share_of_gap", pa.float64()),
        ("suppression", pa.bool_()),
    ]
)

ABLATION = pa.schema(
    [
        ("model", pa.string()),
        ("set", pa.string()),
        ("label", pa.string()),
        ("fraction", pa.float64()),
        ("kind", pa.string()),
        ("draw", pa.int32()),
        ("thinking", pa.string()),
        ("heads", pa.list_(pa.string())),
        ("traces", pa.int64()),
        ("asr", pa.float64()),
        ("asr_low", pa.float64()),
        ("asr_high", pa.float64()),
        ("over_refusal", pa.float64()),
        ("unclosed", pa.float64()),
        ("degenerate", pa.float64()),
        ("perplexity", pa.float64()),
    ]
)

ABLATION_TRACES = pa.schema(
    [
        ("row", pa.int64()),
        ("model", pa.string()),
        ("trace_id", pa.string()),
        ("id", pa.string()),
        ("sample", pa.int32()),
        ("set", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("fraction", pa.float64()),
        ("kind", pa.string()),
        ("draw", pa.int32()),
        ("thinking", pa.string()),
        ("thinking_text", pa.string()),
        ("response", pa.string()),
        ("thinking_tokens", pa.int32()),
        ("response_tokens", pa.int32()),
        ("closed", pa.bool_()),
        ("finish_reason", pa.string()),
        ("outcome", pa.string()),
        ("outcome_reason", pa.string()),
        ("as_before", pa.bool_()),
    ]
)

ABLATION_PERPLEXITY = pa.schema(
    [
        ("row", pa.int64()),
        ("model", pa.string()),
        ("trace_id", pa.string()),
        ("group", pa.string()),
        ("fraction", pa.float64()),
        ("kind", pa.string()),
        ("draw", pa.int32()),
        ("tokens", pa.int32()),
        ("nll", pa.float64()),
    ]
)

SELECTION = pa.schema(
    [
        ("selector", pa.string()),
        ("role", pa.string()),
        ("rank", pa.int32()),
        ("model", pa.string()),
        ("trace_id", pa.string()),
        ("id", pa.string()),
        ("set", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("category", pa.string()),
        ("outcome", pa.string()),
        ("filled", pa.bool_()),
        ("thinking_tokens", pa.int32()),
        ("plateau", pa.float32()),
        ("plateau_max", pa.float32()),
        ("final", pa.float32()),
        ("cliff", pa.float32()),
        ("misalignment", pa.float32()),
        ("misalignment_logit", pa.float32()),
    ]
)

EVALUATION = pa.schema(
    [
        ("model", pa.string()),
        ("before", pa.string()),
        ("set", pa.string()),
        ("label", pa.string()),
        ("trace_id", pa.string()),
        ("id", pa.string()),
        ("sample", pa.int32()),
        ("group", pa.string()),
        ("cluster", pa.string()),
        ("outcome_before", pa.string()),
        ("outcome_after", pa.string()),
        ("harm_before", pa.string()),
        ("harm_after", pa.string()),
        ("cliff_before", pa.float32()),
        ("cliff_after_old_probe", pa.float32()),
        ("cliff_after_own_probe", pa.float32()),
    ]
)

CURVE = pa.schema(
    [
        ("model", pa.string()),
        ("selector", pa.string()),
        ("budget", pa.int32()),
        ("seed", pa.int32()),
        ("set", pa.string()),
        ("label", pa.string()),
        ("traces", pa.int32()),
        ("refused", pa.int32()),
        ("complied", pa.int32()),
        ("unclosed", pa.int32()),
        ("degenerate", pa.int32()),
        ("harmful_examples", pa.int32()),
        ("benign_examples", pa.int32()),
        ("filled", pa.int32()),
        ("cliff_examples", pa.int32()),
        ("steps", pa.int32()),
        ("tokens", pa.int64()),
        ("perplexity", pa.float64()),
    ]
)

CURVE_TRACES = pa.schema(
    [
        ("model", pa.string()),
        ("selector", pa.string()),
        ("budget", pa.int32()),
        ("seed", pa.int32()),
        ("trace_id", pa.string()),
        ("id", pa.string()),
        ("set", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("thinking_tokens", pa.int32()),
        ("response_tokens", pa.int32()),
        ("response", pa.string()),
        ("closed", pa.bool_()),
        ("finish_reason", pa.string()),
        ("outcome", pa.string()),
        ("outcome_reason", pa.string()),
    ]
)
