"""Records as what transformers' Trainer reads: token ids, labels, and the batches made of them."""

from collections.abc import Sequence
from typing import Any

from . import arguments, records
from .errors import UserError

IGNORED = -100  # the label that cross_entropy passes over
MERGED_TOKENS = 3  # at the end of a prompt that may become others when the completion follows


class Texts:
    """Encoded records, as transformers' Trainer reads a data set."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class Encoder:
    """Turns the records of one file into rows of ``input_ids`` and ``labels``.

    Args:
        tokenizer: transformers' own, with a padding token and, for conversations, a chat template.
        data: the file's records.
        max_length: tokens of a row; the rest is cut off.
        completion_only: for prompts with completions, learn from the completion alone.
        assistant_only: for conversations, learn from what the template marks as generated alone.
    """

    def __init__(
        self, tokenizer: Any, data: records.Records, max_length: int, *, completion_only: bool, assistant_only: bool
    ) -> None:
        self.tokenizer, self.data, self.max_length = tokenizer, data, max_length
        self.completion_only, self.assistant_only = completion_only, assistant_only
        self.classes = data.class_indices()
        chats = data.kind == "messages" or any(not isinstance(part, str) for row in data.rows for part in _parts(row))
        if chats and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "--model: the tokenizer has no chat template, and --data holds conversations: give one by --chat_template_path"
            )

    def learnt(self) -> str:
        """What the loss is taken of, in words."""
        if self.data.kind == "label":
            return "the label of each text"
        if self.data.kind == "prompt":
            return "the completions only" if self.completion_only else "every token, of prompts and completions"
        if self.data.kind == "messages":
            return "the assistant's messages only" if self.assistant_only else "every token of each conversation"
        return "every token of each text"

    def encode(self, indices: Sequence[int]) -> Texts:
        """The rows of these records.

        Raises:
            UserError: nothing is left to learn from in a row, or the chat template refuses a conversation.
        """
        rows = []
        for index in indices:
            row = getattr(self, f"_{self.data.kind}")(self.data.rows[index], index)
            labels = row["labels"]
            if isinstance(labels, list) and all(label == IGNORED for label in labels):
                raise UserError(
                    f"--data: record {index + 1} has nothing to learn from in its first {self.max_length} tokens"
                )
            rows.append(row)
        return Texts(rows)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"])

    def _label(self, text: str, index: int) -> dict[str, Any]:
        return {"input_ids": self._ids(text), "labels": self.classes[index]}

    def _text(self, text: str, index: int) -> dict[str, Any]:
        ids = self._ended(self._ids(text))
        return {"input_ids": ids, "labels": list(ids)}

    def _ended(self, ids: list[int]) -> list[int]:
        """With the token that ends a text, where there is room for it."""
        end = self.tokenizer.eos_token_id
        if end is not None and len(ids) < self.max_length and ids[-1:] != [end]:
            return [*ids, end]
        return ids

    def _prompt(self, row: Any, index: int) -> dict[str, Any]:
        prompt, completion = row
        if isinstance(prompt, str):
            before, ids = self._ids(prompt), self._ended(self._ids(prompt + completion))
        else:
            before = self._chat(prompt, index, add_generation_prompt=True)
            ids = self._chat([*prompt, *completion], index)[: self.max_length]
        # As in TRL, the two are tokenised in one, and the completion begins where that leaves the prompt's own tokens: a token may
        # merge across the boundary.
        begin = next(
            (k for k, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids))
        )
        if begin < min(len(before), len(ids)) - MERGED_TOKENS:
            raise UserError(
                f"--data: record {index + 1}: prompt and completion together do not begin as the prompt alone does, so the completion "
                "cannot be told apart"
            )
        labels = [IGNORED if self.completion_only and k < begin else token for k, token in enumerate(ids)]
        return {"input_ids": ids, "labels": labels}

    def _messages(self, messages: Any, index: int) -> dict[str, Any]:
        if not self.assistant_only:
            ids = self._chat(messages, index)[: self.max_length]
            return {"input_ids": ids, "labels": list(ids)}
        encoded = self._chat(messages, index, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = (list(encoded[name])[: self.max_length] for name in ("input_ids", "assistant_masks"))
        if not any(encoded["assistant_masks"]):
            raise UserError(
                "--assistant_only_loss: the chat template marks nothing as generated ({% generation %}); give one that does by "
                "--chat_template_path"
            )
        return {"input_ids": ids, "labels": [token if kept else IGNORED for token, kept in zip(ids, mask, strict=True)]}

    def _chat(self, messages: Any, index: int, **options: Any) -> Any:
        options = {"return_dict": False} | options
        try:
            encoded = self.tokenizer.apply_chat_template(messages, tokenize=True, **options)
        except Exception as error:  # jinja2's, or the template's own raise_exception
            raise UserError(
                f"--data: record {index + 1}: the chat template refuses it: {arguments.first_line(error)}"
            ) from None
        return encoded if options["return_dict"] else list(encoded)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows padded on the right. The mask comes from the lengths: the padding token may be a real one."""
        import torch

        width = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[int], filler: int) -> list[int]:
            return values + [filler] * (width - len(values))

        whole = self.data.kind == "label"
        labels = [row["labels"] if whole else padded(row["labels"], IGNORED) for row in rows]
        return {
            "input_ids": torch.tensor([padded(row["input_ids"], self.tokenizer.pad_token_id) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": torch.tensor(labels),
        }


def _parts(row: Any) -> Sequence[Any]:
    return row if isinstance(row, tuple) else ()
