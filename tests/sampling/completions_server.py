"""A small server of POST /v1/completions and GET /v1/models for tests, with the faults that real ones have.

Run as a process of its own: `python completions_server.py '{"port": 0, "tokenizer": ..., "log": ...}'`; it prints its
port. What it answers follows from the request alone: numbers from a hash, or, with "engine", our own engine. Its log
has a line for each request as it comes ("asked") and when its answer is out ("answered").

dialect: which server it plays.   faults: {"N": kind}, what happens to the Nth request for a completion, from 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import ssl
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

EOS = 2


def invented(prompt: list[int], seed: int | None, limit: int, vocab: int) -> list[int]:
    """The ids of an answer, EOS with them if there is room; they depend on prompt and seed."""
    draw = hashlib.sha256(json.dumps([prompt, seed]).encode()).digest()
    ids = [3 + int.from_bytes(draw[i : i + 3], "little") % (vocab - 3) for i in range(0, 3 * (1 + draw[31] % 9), 3)]
    return [*ids, EOS][:limit]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, settings: dict[str, Any]) -> None:
        from sentencepiece import SentencePieceProcessor

        super().__init__(("127.0.0.1", settings.get("port", 0)), Handler)
        self.settings = settings
        self.pieces = SentencePieceProcessor(model_file=settings["tokenizer"])
        self.count, self.lock = 0, threading.Lock()
        self.engine: Any = None
        if "engine" in settings:
            from llama2cli.sampling.load import load_engine

            self.engine, _ = load_engine(settings["engine"], device="cpu", dtype="fp32")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is not worth a traceback."""

    @property
    def dialect(self) -> str:
        return self.settings.get("dialect", "vllm")

    def draw(self, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        """Ids and their log-probabilities."""
        if self.engine is None:
            seed = body["seed"] if body["temperature"] else None
            ids = invented(body["prompt"], seed, body["max_tokens"], self.pieces.vocab_size())
            return ids, [-0.5 * i for i in range(1, len(ids) + 1)]
        from llama2cli.sampling.sampler import SampleParams

        params = SampleParams(body["max_tokens"], body["temperature"], body["top_p"], body["seed"])
        with self.lock:
            [result] = self.engine.generate([body["prompt"]], [params], logprobs=True)
        return result.ids, result.logprobs


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def note(self, log: str, event: str, body: dict[str, Any]) -> None:
        told = {k: body.get(k) for k in ("prompt", "seed", "temperature", "max_tokens")}
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, json.dumps({"event": event, **told}).encode() + b"\n")
        os.close(file)

    def reply(self, status: int, value: Any, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def authorised(self) -> bool:
        key = self.server.settings.get("key")
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self.reply(401, {"error": "Unauthorized"})
        return False

    def do_GET(self) -> None:
        dialect = self.server.dialect
        if not self.authorised():
            return
        if self.path == "/v1/models" and dialect != "bare":
            entries: list[dict[str, Any]] = [{"id": n, "object": "model"} for n in self.server.settings["models"]]
            for entry in entries:
                if dialect == "llama.cpp":
                    pieces = self.server.settings.get("n_vocab", self.server.pieces.vocab_size())
                    entry |= {"owned_by": "llamacpp", "meta": {"n_vocab": pieces, "n_ctx_train": 4096}}
                elif dialect != "text":
                    entry |= {"owned_by": "vllm", "max_model_len": self.server.settings.get("context", 64)}
            self.reply(200, {"object": "list", "data": entries})
        elif self.path == "/props" and dialect == "llama.cpp":
            self.reply(200, {"default_generation_settings": {"n_ctx": self.server.settings.get("context", 64)}})
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_PUT(self) -> None:
        """Be another server from now on."""
        settings = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.settings, self.server.count = {"models": ["tiny"], **settings}, 0
        self.reply(200, {})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            return self.reply(404, {"detail": "Not Found"})
        if not self.authorised():
            return None
        with server.lock:
            server.count += 1
            fault = server.settings.get("faults", {}).get(str(server.count))
        log = server.settings["log"]
        self.note(log, "asked", body)
        if server.dialect == "strings":
            what = "prompt: Input should be a valid string"
            return self.reply(400, {"error": {"message": what, "type": "BadRequestError"}})
        if body["max_tokens"] + len(body["prompt"]) > server.settings.get("context", 64):
            return self.reply(400, {"error": {"message": "This model's maximum context length is less than that."}})
        time.sleep(server.settings.get("delay", 0))
        if fault:
            getattr(self, f"fault_{fault}")(body)
        else:
            self.reply(200, self.completion(body))
            self.note(log, "answered", body)
        return None

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer in the form of the server that is played."""
        server, prompt = self.server, body["prompt"]
        ids, logprobs = server.draw(body)
        ended = ids[-1] == EOS
        text = server.pieces.decode([1, *prompt, *ids])[len(server.pieces.decode([1, *prompt])) :]
        if "\ufffd" in text or server.pieces.decode(ids).strip() != text.strip():
            text = server.pieces.decode(ids)
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "stop" if ended else "length"}
        choice["logprobs"] = None
        wants = body.get("logprobs") is not None
        if server.dialect == "vllm":
            choice["stop_reason"] = None
            if body.get("return_token_ids"):
                choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        if server.dialect in ("vllm", "old") and wants:
            named = [f"token_id:{i}" if body.get("return_tokens_as_token_ids") else "x" for i in ids]
            choice["logprobs"] = {"tokens": named, "token_logprobs": logprobs, "top_logprobs": [], "text_offset": []}
        if server.dialect == "sglang":
            choice |= {"token_ids": ids[: len(ids) - ended], "matched_stop": EOS if ended else None}
        if server.dialect == "llama.cpp" and wants:
            whole = [k for k in range(len(ids)) if "\ufffd" not in server.pieces.decode(ids[: k + 1])]
            choice["logprobs"] = {"content": [{"id": ids[k], "token": "x", "logprob": logprobs[k]} for k in whole]}
        extra = 1 if server.dialect == "bos" else 0
        usage = {"prompt_tokens": len(prompt) + extra, "completion_tokens": len(ids)}
        for key, value in server.settings.get("spoil", {}).items():
            choice[key] = value
        return {"object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage}

    # --- faults ---------------------------------------------------------------------------------------------------

    def fault_500(self, body: dict[str, Any]) -> None:
        self.reply(500, {"error": {"message": "EngineCore encountered an issue", "code": 500}})

    def fault_503(self, body: dict[str, Any]) -> None:
        self.reply(503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}})

    def fault_429(self, body: dict[str, Any]) -> None:
        self.reply(429, b"slow down", Retry_After="1")

    def fault_hang(self, body: dict[str, Any]) -> None:
        time.sleep(2)

    def fault_trickle(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(40):
            self.wfile.write(b" ")
            time.sleep(0.05)

    def fault_close(self, body: dict[str, Any]) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)

    def fault_reset(self, body: dict[str, Any]) -> None:
        data = json.dumps(self.completion(body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def fault_cut(self, body: dict[str, Any]) -> None:
        data = json.dumps(self.completion(body)).encode()
        self.reply(200, data[: len(data) // 2])

    def fault_html(self, body: dict[str, Any]) -> None:
        self.reply(200, b"<html><body>Bad gateway</body></html>")

    def fault_abort(self, body: dict[str, Any]) -> None:
        answer = self.completion(body)
        answer["choices"][0] |= {"finish_reason": "abort", "text": "", "token_ids": []}
        self.reply(200, answer)

    def fault_error(self, body: dict[str, Any]) -> None:
        self.reply(200, {"error": {"message": "upstream"}})


def main() -> None:
    server = Server({"models": ["tiny"], **json.loads(sys.argv[1])})
    if "certificate" in server.settings:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server.settings["certificate"], server.settings["certificate_key"])
        server.socket = context.wrap_socket(server.socket, server_side=True)
    print(server.server_address[1], flush=True)
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
