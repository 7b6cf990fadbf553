"""Chat templates by name; `hf` is the one that a checkpoint brings."""

from __future__ import annotations

# The conversation that LLaVA-1.5, LLaVA-NeXT and Mini-Gemini were trained and are evaluated with (conv_vicuna_v1).
# Templates that come with transformers' checkpoints leave its first sentence out.
VICUNA_V1 = (
    "{% if messages[0].role != 'system' %}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "{% endif %}"
    "{% for message in messages %}"
    "{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message.role] }}"
    "{% for part in message.content %}"
    "{{ part.text if part.type == 'text' else '<' + part.type + '>\n' }}"
    "{% endfor %}"
    "{{ '</s>' if message.role == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEMPLATES = {"hf": None, "vicuna_v1": VICUNA_V1}
