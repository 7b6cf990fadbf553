"""Chat templates by name; `hf` is the one that a checkpoint brings."""

from __future__ import annotations

# The conversation that models with a Vicuna decoder were trained and are evaluated with. Templates that come with
# transformers' checkpoints leave its first sentences out.
CONVERSATION = (
    "{% if messages[0].role != 'system' %}"
    "A chat between a curious WHO and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the WHO's questions. "
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
VICUNA_V1 = CONVERSATION.replace(
    "WHO", "user"
)  # conv_vicuna_v1 of LLaVA-1.5, LLaVA-NeXT and Mini-Gemini
LLAVA_V1 = CONVERSATION.replace(
    "WHO", "human"
)  # conv_llava_v1, which Video-LLaVA is evaluated with
TEMPLATES = {"hf": None, "vicuna_v1": VICUNA_V1, "llava_v1": LLAVA_V1}
