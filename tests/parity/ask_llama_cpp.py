"""Asks llama.cpp itself, prebuilt in xllamacpp: an exported GGUF file loads and answers a chat.

    python ask_llama_cpp.py model.gguf "What is the capital of France?"

Prints the answer, greedy, and exits with 1 where there is none.
"""

import sys

import xllamacpp


def main(path, question):
    options = xllamacpp.CommonParams()
    options.model.path = path
    options.n_ctx = 512
    options.n_parallel = 1
    options.warmup = False
    server = xllamacpp.Server(options)
    messages = [{"role": "user", "content": question}]
    answer = server.handle_chat_completions({"messages": messages, "max_tokens": 32, "temperature": 0})
    text = answer["choices"][0]["message"]["content"]
    print(text)
    sys.exit(0 if text.strip() else 1)


if __name__ == "__main__":
    main(*sys.argv[1:3])
