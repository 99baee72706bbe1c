"""What the tests of the walk and of GPTQ share: the stages of a Llama block, and a model on its grid."""

from llmqat.models.patcher import prepare
from llmqat.scheme import QuantScheme

STAGES = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
SCHEME = QuantScheme(4, 16)


def prepared(model, scheme=SCHEME, **kwargs):
    return model, prepare(model, scheme, **kwargs)
