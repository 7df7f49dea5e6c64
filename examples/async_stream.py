"""Answers questions under asyncio, each for a second at most. Usage: python async_stream.py model.gqsa "Hi" …"""

import asyncio
import sys

from gqsa_runtime import Model


async def answer(model: Model, prompt: str, seconds: float = 1.0) -> str:
    generation, text = model.generate_async(prompt, max_new_tokens=64), ""
    # The event loop is free while pieces are made; `cancel` ends what takes too long.
    alarm = asyncio.get_running_loop().call_later(seconds, generation.cancel)
    async for piece in generation:
        text += piece
    alarm.cancel()
    return text


async def answer_all(path: str, prompts: tuple[str, ...]) -> None:
    model = await asyncio.to_thread(Model.open, path)
    with model:
        for prompt, text in zip(
            prompts, await asyncio.gather(*(answer(model, prompt) for prompt in prompts)), strict=True
        ):
            print(f"{prompt!r}: {text!r}")


def main(path: str, *prompts: str) -> None:
    asyncio.run(answer_all(path, prompts))


if __name__ == "__main__":
    main(*sys.argv[1:])
