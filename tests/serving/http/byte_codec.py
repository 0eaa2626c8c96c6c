"""A codec whose ids 0 .. 255 are bytes, 256 .. 299 special tokens and words; its chat form is plain lines."""

EOS = 256
WORDS = {
    260: b"Hello",
    261: b" world",
    262: "é".encode(),
    263: "\U0001f600".encode(),
    264: b"</s",
    265: b"top>",
    266: b"abca",
    267: b"bcab",
}


class ByteCodec:
    stop_ids = (EOS,)
    special_ids = frozenset(range(256, 260))

    def encode_chat(self, messages, template_kwargs):
        if template_kwargs.get("fails"):
            raise ValueError("the chat template failed on this chat: conversation roles must alternate")
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        if "enable_thinking" in template_kwargs:
            text += f"thinking={template_kwargs['enable_thinking']}\n"
        return self.encode_text(text + "assistant: ")

    def encode_text(self, text, add_special_tokens=True):
        return list(text.encode("utf-8"))

    def decode(self, ids, skip_special_tokens=False):
        kept = (i for i in ids if not (skip_special_tokens and i in self.special_ids))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def token_bytes(self, token_id):
        if token_id < 256:
            return bytes([token_id])
        return WORDS.get(token_id, f"<|{token_id}|>".encode())
