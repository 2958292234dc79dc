"""Any OpenAI client (`pip install openai`) talks to a kvtier router.

`python openai_client.py http://HOST:8000/v1`
"""

import os
import sys

import openai

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
model = client.models.list().data[0].id
question = {"role": "user", "content": "When is the lamp lit?"}

stream = client.chat.completions.create(
    model=model, messages=[question], max_completion_tokens=8, temperature=0, stream=True,
    stream_options={"include_usage": True},
)  # fmt: skip
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f"\n{model}: {chunk.usage.completion_tokens} tokens")
