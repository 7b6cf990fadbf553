"""A judge model behind an OpenAI-compatible address; its prompts are in zipeval/benchmarks/protocols.py."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit

import openai

from zipeval.benchmarks.protocols import JudgeProtocol, Message
from zipeval.config.schema import JudgeConfig
from zipeval.errors import UsageError
from zipeval.utils.urls import public_url

KEY = "OPENAI_API_KEY"
# Seconds for one reply.
TIMEOUT = 60.0
# Repeats of a request that fails, with the client's own pauses.
RETRIES = 2
THREADS = 8
# After so many requests in a row without a reply the rest is left for another run.
GIVE_UP = 10


class JudgeError(Exception):
    """No verdict on one answer; its sample stays unscored, and the run goes on."""


class NoVerdict(JudgeError):
    """The judge replied, though not with a verdict; about another answer it may."""


class Judge:
    """The model that `judge.url` and `judge.model` name.

    Args:
        config: both set. The key is read from the environment, and never part of a message.

    Raises:
        UsageError: if the key cannot be sent.
    """

    def __init__(self, config: JudgeConfig):
        self.named = f"judge.model={config.model} at judge.url={public_url(config.url)}"
        self._model = config.model
        key = os.environ.get(KEY, "").strip()
        # The client refuses such a key too, in a message that shows it.
        if not re.fullmatch("[!-~]*", key):
            raise UsageError(
                f"{KEY}: it holds a character that no key has, such as a line break. "
                "Set it again."
            )
        # Servers and the client repeat them in messages.
        self._secrets = [*filter(None, (key, urlsplit(config.url).password))]
        self._client = openai.OpenAI(
            # The client insists on a key, local servers do not.
            api_key=key or "none",
            base_url=config.url,
            timeout=TIMEOUT,
            max_retries=RETRIES,
        )
        # Requests in a row without a reply.
        self._failures = 0

    def check(self, protocols: Iterable[JudgeProtocol]) -> None:
        """Ask the judge one question of each protocol.

        Raises:
            UsageError: if it gives no verdict on one.
        """
        try:
            for protocol in protocols:
                self.verdict(protocol, protocol.probe)
        except JudgeError as error:
            raise UsageError(
                f"{self.named}: {error}. Set judge.url= to an OpenAI-compatible server "
                "(its address ends in /v1), "
                "judge.model= to a model that it serves, and its key, if it needs "
                f"one, in the environment as {KEY}."
            ) from error

    def verdict(self, protocol: JudgeProtocol, sample: dict) -> dict:
        """Return the judge's verdict on a sample, as the protocol reads it.

        Raises:
            JudgeError: if there is none.
        """
        text = self._reply(protocol.messages(sample))
        if not text:
            raise NoVerdict("its reply is empty")
        try:
            return protocol.verdict(text, sample)
        except ValueError as error:
            raise NoVerdict(self._redact(f"its reply {error}: {text!r}")) from error

    def _reply(self, messages: list[Message]) -> str:
        """Return the text that the judge replies with.

        Raises:
            JudgeError: if there is no reply.
        """
        try:
            # Greedy, so that the same answer gets the same verdict again.
            reply = self._client.chat.completions.create(
                model=self._model, messages=messages, temperature=0
            )
        except openai.APITimeoutError as error:
            raise JudgeError(f"no reply within {self._client.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise JudgeError(
                self._redact(f"not reachable ({error.__cause__ or error})")
            ) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            # Servers repeat a part of the key in what they say.
            refused = (
                "the key is refused"
                if self._secrets
                else f"a key is needed, {KEY} is not set"
            )
            raise JudgeError(f"{refused} (HTTP {error.status_code})") from error
        # Such as an answer that the server's filter stops.
        except openai.BadRequestError as error:
            raise NoVerdict(self._redact(str(error))) from error
        except openai.OpenAIError as error:
            raise JudgeError(self._redact(str(error))) from error
        # A reply that is not JSON: the client lets the error of its parser pass.
        except ValueError as error:
            raise JudgeError(
                self._redact(f"its reply cannot be read ({error})")
            ) from error
        return _text(reply).strip()

    def score(
        self,
        protocol: JudgeProtocol,
        samples: list[dict],
        advance: Callable[[int], None],
    ) -> None:
        """Ask about each of the samples that are unscored; each is left with a verdict, or the reason for none."""
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(partial(self._score, protocol), samples):
                advance(1)

    def _score(self, protocol: JudgeProtocol, sample: dict) -> None:
        """Give a sample its verdict, or the reason for none."""
        # A judge that is gone would cost a timeout for every answer.
        if self._failures >= GIVE_UP:
            sample["unscored"] = f"not asked: the judge failed {GIVE_UP} times in a row"
            return
        try:
            sample |= self.verdict(protocol, sample)
            del sample["unscored"]
            self._failures = 0
        except NoVerdict as error:
            sample["unscored"] = str(error)
            self._failures = 0
        except JudgeError as error:
            sample["unscored"] = str(error)
            self._failures += 1

    def _redact(self, text: str) -> str:
        """Return the beginning of a text on one line, without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())[:200]


def _text(reply) -> str:
    """Return the text of a reply; an empty one where it has none."""
    # The client does not validate what servers send.
    try:
        content = reply.choices[0].message.content
    except (AttributeError, LookupError, TypeError):
        return ""
    return content if isinstance(content, str) else ""
