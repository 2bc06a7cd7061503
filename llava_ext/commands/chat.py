"""`evotok-llava chat`: ask about images and have images drawn in the terminal."""

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from evotok_plugin.common.files import check_output_folder
from evotok_plugin.common.folders import write_whole_folder
from evotok_plugin.common.interruption import Stopped, forget_stop
from evotok_plugin.common.pictures import enlarged
from evotok_plugin.data.files import local_path
from evotok_plugin.data.images import FORMATS, IMAGE_SUFFIXES
from evotok_plugin.errors import UserError
from llava_ext.commands.options import drawing_options, open_selected_model
from llava_ext.generation import AnswerOptions, Event, ImageDrawn, ImageStarted, SelectionOptions, TextDelta
from llava_ext.generation.selection import READING
from llava_ext.model_folder import OpenModel
from llava_ext.serving.image_files import Provenance, file_name, file_scale, write_drawn
from llava_ext.serving.session import ChatSession
from llava_ext.serving.uploads import UploadLimits, open_upload

_HELP = """Ask a question or say what to draw. Image paths in a line are read as images; quote paths with spaces.
/draw PROMPT  draw an image
/image PATH   add an image to the next question
/save FOLDER  save the conversation: conversation.json and its images
/reset        start a new conversation
/help         show this help
/quit         quit (also Ctrl-D; Ctrl-C stops an answer)"""

_SUFFIX = "|".join(re.escape(suffix) for suffix in IMAGE_SUFFIXES)
_IMAGE = re.compile(
    rf"""(?P<url>https?://\S*[^\s,;:!?.)])|(?P<quote>["'])(?P<quoted>[^"']+(?:{_SUFFIX}))(?P=quote)|"""
    rf"""(?P<bare>(?:\\\ |[^\s"'])+(?:{_SUFFIX}))(?=[\s,;:!?.)]|$)""",
    re.IGNORECASE,
)


def run(arguments: argparse.Namespace) -> None:
    """Answer one question, or read a conversation line by line if none is given."""
    SelectionOptions(arguments.best_of)  # checks the range
    pending = [open_chat_image(path) for path in arguments.image]
    options = AnswerOptions(arguments.max_new_tokens, arguments.max_images, drawing=drawing_options(arguments))
    check_output_folder(arguments.output)
    opened = open_selected_model(arguments)
    options = replace(options, drawing=options.drawing.for_model(opened.model))
    scale = file_scale(opened.model.config.vision_config.image_size, arguments.scale)
    chat = Chat(opened, options, arguments.seed, arguments.output, scale, pending, arguments.best_of)
    if arguments.question is not None:
        chat.ask(*extract_images(arguments.question))
        return
    input_prompt = "you: " if sys.stdin.isatty() else ""
    if input_prompt:
        print("/help lists the commands", file=sys.stderr)
    while not chat.ended:
        try:
            line = input(input_prompt)
        except (EOFError, KeyboardInterrupt) as end:
            _raise_unless_ctrl_c(end)
            print(file=sys.stderr)
            return
        except UnicodeDecodeError as error:
            raise UserError(f"the input is not text in {error.encoding}: {error.reason}") from error
        try:
            chat.execute(line.strip())
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def _raise_unless_ctrl_c(end: BaseException) -> None:
    """Ctrl-C ends an answer, or the chat at its prompt; SIGTERM and SIGHUP end the command."""
    if isinstance(end, Stopped) and end.number != signal.SIGINT:
        raise end
    forget_stop()


# Images in a line ------------------------------------------------------------------------------------------------


def open_chat_image(path: str) -> Image.Image:
    """Read an image file.

    Raises:
        UserError: the file is missing, broken or too large, or it is not on this machine.
    """
    if re.match("https?://", path, re.IGNORECASE):
        raise UserError(f"{path} is not fetched; save the image and give its path")
    if not os.path.exists(_path(path)):  # Path.exists raises an error for names that are too long
        raise UserError(f"image {path!r} does not exist")
    return open_upload(_path(path), UploadLimits(), name=path, formats=FORMATS)


def extract_images(line: str) -> tuple[str, list[Image.Image]]:
    """Split a line into its text and the images whose paths it contains, in order.

    A word without quotes or slashes is a path only if the file exists.

    Raises:
        UserError: as `open_chat_image`.
    """
    images = []

    def extract(match: re.Match[str]) -> str:
        path = match["url"] or match["quoted"] or match["bare"].replace("\\ ", " ")
        if match["bare"] and "/" not in path and not os.path.isfile(_path(path)):
            return match[0]
        images.append(open_chat_image(path))
        return ""

    return " ".join(_IMAGE.sub(extract, line).split()), images


def _path(path: str) -> Path:
    """Convert a path or a file:// URL, which file managers paste.

    Raises:
        UserError: the URL names a file on another machine.
    """
    return Path(local_path(path))


def _unquote(path: str) -> str:
    quoted = len(path) > 1 and path[0] == path[-1] and path[0] in "\"'"
    return path[1:-1] if quoted else path.replace("\\ ", " ")


# The conversation ------------------------------------------------------------------------------------------------


@dataclass
class Chat:
    """A conversation in the terminal.

    Attributes:
        seed: seed of the first turn's images; every later turn adds 1.
        output: folder for drawn images.
        scale: factor by which the files of drawn images are enlarged.
        pending: images for the next question.
        best_of: candidates of an image that `/draw` draws.
        in_line: whether the output has not ended its current line.
        ended: whether the user has quit.
    """

    opened: OpenModel
    options: AnswerOptions
    seed: int
    output: Path
    scale: int
    pending: list[Image.Image]
    best_of: int = 1
    session: ChatSession = field(default_factory=ChatSession)
    in_line: bool = False
    ended: bool = False

    def execute(self, line: str) -> None:
        """Execute a command or ask a question.

        Raises:
            UserError: the line cannot be executed; the conversation is unchanged.
        """
        command, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/draw": self._draw,
            "/image": self._add_image,
            "/save": self._save,
        }
        if command in commands:
            if not rest.strip():
                raise UserError(f"{command} needs an argument; /help shows how to use it")
            commands[command](rest.strip())
        elif command == "/reset":
            self.session, self.pending = ChatSession(), []
        elif command == "/help":
            print(_HELP)
        elif command == "/quit":
            self.ended = True
        elif re.fullmatch("/[a-z]+", command) and not os.path.exists(_path(command)):
            raise UserError(f"unknown command {command}; /help lists the commands")
        elif line:
            text, images = extract_images(line)
            if text:
                self.ask(text, images)
            else:
                self._add_pending(images)

    def ask(self, text: str, images: Sequence[Image.Image] = (), options: AnswerOptions | None = None) -> None:
        """Ask a question and print the answer while it is generated.

        Raises:
            UserError: the question cannot be answered; the conversation and the pending images are unchanged.
        """
        opened, seed = self.opened, self.seed + self.session.num_turns
        before = self.session.messages
        answer = self.session.ask(
            opened.model, opened.processor, text, [*self.pending, *images], options or self.options, seed
        )
        try:
            for event in answer:
                self._show(event, text, seed)
        except KeyboardInterrupt as stop:
            answer.close()
            _raise_unless_ctrl_c(stop)
            print(" (stopped)", file=sys.stderr)
        except Exception:
            answer.close()
            self.session.messages = before
            raise
        self.pending = []
        self._end_line()

    def _show(self, event: Event, question: str, seed: int) -> None:
        if isinstance(event, TextDelta):
            print(event.text, end="", flush=True)
            self.in_line = not event.text.endswith("\n")
        elif isinstance(event, ImageStarted):
            print("(drawing)", file=sys.stderr)
        elif isinstance(event, ImageDrawn):
            self._end_line()
            seed += event.index
            settings = self.options.drawing.settings() | {"turn": self.session.num_turns + 1}
            if event.choice is not None:
                settings |= {"best_of": self.best_of, "judge": READING, **event.choice.record()}
            provenance = Provenance(question, seed, self.opened.name, settings, self.opened.fingerprint, self.scale)
            path = write_drawn(
                enlarged(event.image, self.scale), self.output, f"{file_name(question)}_seed{seed}", provenance
            )
            print(f"[image: {path}]", flush=True)

    def _end_line(self) -> None:
        if self.in_line:
            print(flush=True)
        self.in_line = False

    def _draw(self, prompt: str) -> None:
        self.ask(prompt, options=replace(self.options, image_first=True, best_of=self.best_of))

    def _add_image(self, path: str) -> None:
        self._add_pending([open_chat_image(_unquote(path))])

    def _add_pending(self, images: Sequence[Image.Image]) -> None:
        self.pending += images
        noun = "image" if len(self.pending) == 1 else "images"
        print(f"{len(self.pending)} {noun} for the next question", file=sys.stderr)

    def _save(self, folder: str) -> None:
        """Write the conversation as Hugging Face messages in which images are named by their files."""

        def write(out: Path) -> None:
            messages, count = [], 0
            for message in self.session.messages:
                content = []
                for part in message["content"]:
                    if part["type"] == "image":
                        count += 1
                        part["image"].save(out / f"image{count}.png")
                        part = {"type": "image", "image": f"image{count}.png"}
                    content.append(part)
                messages.append({"role": message["role"], "content": content})
            (out / "conversation.json").write_text(json.dumps(messages, ensure_ascii=False, indent=2), encoding="utf-8")

        write_whole_folder(_path(_unquote(folder)), write)
        print(_unquote(folder))
