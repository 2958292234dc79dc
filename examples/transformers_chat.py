"""A long prompt is read once: the second time it comes from host memory, then from disk."""

import tempfile

from kvtier.engine.embedded import Model, node

text = "The lamp is lit at dusk and put out at dawn. " * 20

with tempfile.TemporaryDirectory() as folder:  # yours would stay
    for run in ("first process", "after a restart"):
        with node(host="128MiB", disk=folder) as socket, Model("smollm2", socket=socket) as model:
            for question in ("When is the lamp lit?", "When is it put out?"):
                answer = model.generate(f"{text}\nQ: {question}\nA:", max_tokens=8)
                print(f"{run}: {answer.prompt_tokens} tokens, restored {answer.restored}")
                print(f"  {question}{answer.text!r}")
                model.forget()  # as if other requests had pushed it out of VRAM
