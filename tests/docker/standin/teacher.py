"""The stand-in teacher of the examples as a container: the same app, on all of its addresses."""

from __future__ import annotations

from pathlib import Path

import uvicorn

from examples.standin_teacher import Answers, Settings, Teacher, create_app


def main() -> None:
    answers = Answers.read(sorted(Path("/stand-in/examples").glob("*.jsonl")), ["text"])
    app = create_app(Teacher(answers, Settings()))
    uvicorn.run(app, host="0.0.0.0", port=8899, log_level="warning")


if __name__ == "__main__":
    main()
