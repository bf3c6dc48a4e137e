"""What a linear module does in a transformer, told from its path: the part it plays is not in its class."""

import re

_ATTENTION = r"\w*(attn|attention)\w*\.((self|attn|attention|output)\.)?"
_FEEDFORWARD = r"(\w*(mlp|ffn|feed_?forward|densereludense)\w*)\."

_ROLES = (
    ("fused", rf"(c_attn|query_key_value|w?qkv|qkv_proj|{_ATTENTION}in_proj)"),
    ("query", rf"(q_proj|q_lin|query_proj|wq|to_q|{_ATTENTION}(query|q))"),
    ("key", rf"(k_proj|k_lin|key_proj|wk|to_k|{_ATTENTION}(key|k))"),
    ("value", rf"(v_proj|v_lin|value_proj|wv|to_v|{_ATTENTION}(value|v))"),
    ("attention-output", rf"(o_proj|out_lin|to_out\.0|{_ATTENTION}(out_proj|c_proj|dense|wo|o))"),
    (
        "feedforward-output",
        rf"(down_proj|fc2|fc_out|lin2|linear2|ffn_output|dense_4h_to_h|w2|{_FEEDFORWARD}(c_proj|wo))",
    ),
    (
        "feedforward-input",
        r"((up|gate|gate_up)_proj|fc1|fc_in|lin1|linear1|c_fc|dense_h_to_4h|w1|w3|wi|wi_0|wi_1|ffn|intermediate\.dense)",
    ),
    ("feedforward-output", r"output\.dense"),  # BERT's; its attention's own stands in attention.output
)
"""Role and the ends of paths that play it, in any case; the first match wins. Names that mean one thing stand alone,
names that could mean another (`dense`, `out_proj`, `o`) count only inside what is called attention or feedforward."""


def role_of(path: str) -> str | None:
    """The role of the linear module at `path`.

    Returns:
        "query", "key", "value", "fused" (all three in one), "attention-output", "feedforward-input",
        "feedforward-output", or None for a name that says nothing.
    """
    return next((role for role, end in _ROLES if re.fullmatch(rf"(.*\.)?{end}", path, re.IGNORECASE)), None)
