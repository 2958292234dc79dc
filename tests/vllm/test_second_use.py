"""With `save = "second-use"` a block leaves VRAM when a second request has it, and not before."""

from kvtier.wire.pb import feed_pb2
from tests.launching import wait_for
from tests.vllm.driver import BLOCK, Engine, transfer

HOST = feed_pb2.TIER_HOST
PATIENT = {"lookup_s": 30.0, "load_s": 30.0, "store_s": 50.0}  # slow machines are no misses here


def test_a_prompt_is_kept_from_its_second_use_on(model, folder, node, prompts):
    config = transfer(node.socket, cpu_blocks=96, save="second-use", **PATIENT)
    prompt, other = prompts[0], prompts[1]
    whole = (len(prompt) - 1) // BLOCK
    with Engine(model, folder, config) as engine:
        engine.generate([prompt, other], 4)
        ((warm, cached),) = engine.answers([prompt], 4)  # the second request that has it
        assert cached == whole * BLOCK
        wait_for("the prompt to be in host memory", lambda: node.blocks(HOST) >= whole)
        assert node.blocks(HOST) <= len(prompt) // BLOCK + 1, "nothing of what was used once"
        engine.forget()
        ((restored, cached),) = engine.answers([prompt], 4)
        assert (restored, cached) == (warm, whole * BLOCK)
        ((_, cached),) = engine.answers([other], 4)
        assert not cached, "it was used once before VRAM forgot it, and computed again"
        wait_for("it, too", lambda: node.blocks(HOST) >= whole + len(other) // BLOCK)
