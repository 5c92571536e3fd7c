# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
The states that a server keeps: those that clients have made by /v1/states, and the soft prompts of prefixes that
prompts share. [`StateStore`] holds both in memory and, with a folder, on disk, where they survive a restart.
"""

import hashlib
import hmac
import os
import queue
import threading
import time
from collections import OrderedDict
from pathlib import Path

from transformers.utils import logging

from phase15.model.cache_phase15 import KeptConversations
from phase15.model.continuous_batching_phase15 import Phase15ContinuousBatchProcessor
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.model.recursion_phase15 import SoftPrompt
from phase15.model.state_phase15 import Phase15State


logger = logging.get_logger("transformers.phase15.serve")

SUFFIX = ".safetensors"
MAX_UNWRITTEN = 256  # states that wait for the disk; more are not written
SCAN_EVERY = 256  # writes after which the folder's size is measured anew, since other servers may write, too
STALE_SECONDS = 3600  # a temporary file of this age was left by a process that was killed


def salt_of_key(key: str | None) -> bytes:
    """
    Returns the salt of an API key. Clients with different keys share no state, so none can confirm another's text by
    `cached_tokens` or by time. The salt does not reveal the key, and is the same after a restart.
    """
    return b"" if key is None else hmac.new(key.encode(), b"phase15 states", hashlib.sha256).digest()


def state_name(state_id: str, salt: bytes) -> str:
    """Returns the name under which a state is stored: only its id and the key that made it lead there."""
    return "state-" + hmac.new(salt, state_id.encode(), hashlib.sha256).hexdigest()


class StateStore:
    """
    States by name, in memory and in a folder, the least recently used of which are removed at a limit of bytes. The
    limit holds for memory and for the folder, each.

    Args:
        model (`Phase15ForCausalLM`): has read the states.
        folder (`Path`, *optional*): several servers may share one. Without it nothing survives the process.
        max_bytes (`int`): maximum size of all states.
    """

    def __init__(self, model: Phase15ForCausalLM, folder: Path | None, max_bytes: int):
        self.model = model
        self.folder = folder
        self.max_bytes = max_bytes
        self.states: OrderedDict[str, Phase15State] = OrderedDict()
        self.num_bytes = 0  # of the states in memory
        self.lock = threading.RLock()
        self._written: set[str] = set()  # names whose files this process has written or read
        self._num_writes = 0
        self._folder_bytes = 0
        self._has_warned = False
        self._unwritten: queue.Queue = queue.Queue(MAX_UNWRITTEN)
        self._writer: threading.Thread | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale(folder)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def get(self, name: str) -> Phase15State | None:
        """Returns a state, which is now the most recently used, from memory or the folder; None if there is none."""
        with self.lock:
            state = self.states.get(name)
        if self.folder is None and state is None:
            return None
        if state is None:
            state = self._load(name)
        elif name in self._written and not self.path(name).is_file():
            self._forget(name)  # another server has removed it
            return None
        if state is not None:
            self.mark_used(name)
        return state

    def mark_used(self, name: str):
        """Makes a state the most recently used, in memory and on disk."""
        with self.lock:
            if name in self.states:
                self.states.move_to_end(name)
        if self.folder is not None:
            touch(self.path(name))

    def _load(self, name: str) -> Phase15State | None:
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            state = Phase15State.from_pretrained(path, self.model)
        except (OSError, ValueError) as error:  # another model's, or damaged: as if it were not there
            if not self._has_warned:
                logger.warning(f"Kept states are not used if they are damaged or another model's: {error}")
            self._has_warned = True
            return None
        self._written.add(name)
        state = state.to("cpu")
        self._add(name, state)
        return state

    def put(self, name: str, state: Phase15State):
        """Stores a state, in the host's memory. A thread writes it to the folder."""
        state = state.to("cpu")
        self._add(name, state)
        if self.folder is None:
            return
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="state writer", daemon=True)
            self._writer.start()
        try:
            self._unwritten.put_nowait((name, state))
        except queue.Full:
            logger.warning_once(f"{self.folder} is too slow: some states are kept only in memory.")

    def _add(self, name: str, state: Phase15State):
        with self.lock:
            self._forget(name)
            self.states[name] = state
            self.num_bytes += state.nbytes
            while self.num_bytes > self.max_bytes and len(self.states) > 1:
                self._forget(next(iter(self.states)))

    def _forget(self, name: str) -> bool:
        """Removes a state from memory, and returns `True` if it was there."""
        with self.lock:
            state = self.states.pop(name, None)
            if state is not None:
                self.num_bytes -= state.nbytes
            return state is not None

    def delete(self, name: str) -> bool:
        """Removes a state, and returns `True` if there was one."""
        self.flush()  # what is still to be written would come back
        is_known = self._forget(name)
        if self.folder is not None and self.path(name).is_file():
            self.path(name).unlink(missing_ok=True)
            is_known = True
        return is_known

    def flush(self):
        """Waits until all states are written."""
        if self._writer is not None:
            self._unwritten.join()

    def _write(self):
        while True:
            name, state = self._unwritten.get()
            try:
                state.save_pretrained(self.path(name))
                self._written.add(name)
                self._count_write(self.path(name).stat().st_size)
            except OSError as error:  # such as a full disk: the state stays in memory
                logger.warning(f"{self.path(name)} could not be written: {error}")
            except Exception:  # the thread goes on with the next
                logger.exception("A state could not be written")
            finally:
                self._unwritten.task_done()

    def _count_write(self, size: int):
        """Trims the folder if it has passed its limit, by its last measured size and what was written since."""
        is_due = self._num_writes % SCAN_EVERY == 0
        self._num_writes += 1
        self._folder_bytes += size
        if is_due or self._folder_bytes > self.max_bytes:
            self._folder_bytes = self._trim()

    def _trim(self) -> int:
        """Removes the files that were used least recently, until the rest fits. Returns the size of the rest."""
        entries = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another server has removed it
                continue
            entries.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries, key=lambda entry: entry[0])[:-1]:
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


def touch(path: Path):
    """Marks a file as used now."""
    try:
        os.utime(path)
    except OSError:  # removed meanwhile, or of another user
        pass


def remove_stale(folder: Path):
    """Removes temporary files of processes that were killed while they wrote."""
    for path in folder.glob(f".*{SUFFIX}.*"):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)


class StoredConversations(KeptConversations):
    """
    Soft prompts of prefixes, which a store also keeps on disk.

    Args:
        lanes (`Phase15ContinuousBatchProcessor`): whose stored soft prompts these become.
        store (`StateStore`): with a folder.
    """

    def __init__(self, lanes: Phase15ContinuousBatchProcessor, store: StateStore):
        super().__init__(lanes.conversations.size, lanes.conversations.segment_length)
        self.store = store
        self.body = lanes.model.model
        self.chunk_length = lanes.chunk_length
        self.model_salt = bytes.fromhex(self.body.model_digest() or "")

    def name(self, key: bytes) -> str:
        # With the model's digest, so that a folder can serve several models.
        return "prefix-" + hashlib.sha256(self.model_salt + key).hexdigest()

    def find(self, key: bytes) -> SoftPrompt | None:
        soft_prompt = super().find(key)
        if soft_prompt is not None:
            self.store.mark_used(self.name(key))
            return soft_prompt
        state = self.store.get(self.name(key))
        if state is None:
            return None
        soft_prompt = state.to(self.body.device).soft_prompt
        super().add(key, soft_prompt)
        return soft_prompt

    def add(self, key: bytes, soft_prompt: SoftPrompt):
        super().add(key, soft_prompt)
        # The store does not need to know the text: its name is the digest of it.
        self.store.put(self.name(key), self.body.make_state(soft_prompt, [[]], None, self.chunk_length))


__all__ = ["StateStore", "StoredConversations", "salt_of_key", "state_name"]
