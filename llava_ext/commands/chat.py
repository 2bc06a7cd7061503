"""`evotok-llava chat`: ask about images, and let images be drawn, in the terminal."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from evotok_plugin.common.folders import write_whole_folder
from evotok_plugin.data.files import local_path
from evotok_plugin.data.images import FORMATS, IMAGE_SUFFIXES
from evotok_plugin.errors import UserError
from llava_ext.commands.options import SharedOptions, drawing_options
from llava_ext.generation import Event, ImageDrawn, ImageStarted, TextDelta
from llava_ext.generation.interleaved import AnswerOptions
from llava_ext.model_folder import OpenModel, open_model
from llava_ext.serving.image_files import Origin, check_folder, file_name, write_drawn
from llava_ext.serving.session import Conversation
from llava_ext.serving.uploads import UploadLimits, open_upload
from llava_ext.serving.web_images import fetch

_HELP = """Ask, or say what to draw. Paths of images in a line are read, in quotes where they hold spaces.
/draw PROMPT  have an image drawn, whatever the model would answer
/image PATH   an image for the next question
/save FOLDER  write the conversation: conversation.json and its images
/reset        start over
/help         this
/quit         leave (so does Ctrl-D; Ctrl-C stops an answer)"""

_ENDS = "|".join(re.escape(suffix) for suffix in IMAGE_SUFFIXES)
_IMAGE = re.compile(
    rf"""(?P<url>https?://\S*[^\s,;:!?.)])|(?P<quote>["'])(?P<quoted>[^"']+(?:{_ENDS}))(?P=quote)|"""
    rf"""(?P<bare>(?:\\\ |[^\s"'])+(?:{_ENDS}))(?=[\s,;:!?.)]|$)""",
    re.IGNORECASE,
)


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser("chat", parents=[shared.model, shared.drawing], help="ask about images, and draw")
    parser.add_argument("question", nargs="?", help="without it, a conversation is read from the terminal")
    parser.add_argument("--image", action="append", default=[], help="image file; may be given several times")
    parser.add_argument("--max_new_tokens", type=int, help="of text in an answer (default: the model's, or 256)")
    parser.add_argument("--max_images", type=int, default=4, help="in an answer")
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), help="folder for images that are drawn")
    parser.add_argument(
        "--allow_urls", action="store_true", help="fetch images from http and https addresses of public servers"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Answer one question, or, without one, a conversation line by line."""
    pictures = Pictures(arguments.allow_urls)
    pending = [pictures.open(where) for where in arguments.image]
    options = AnswerOptions(arguments.max_new_tokens, arguments.max_images, drawing=drawing_options(arguments))
    check_folder(arguments.output)
    opened = open_model(arguments)
    options = replace(options, drawing=options.drawing.for_model(opened.model))
    chat = Chat(opened, options, arguments.seed, arguments.output, pictures, pending)
    if arguments.question is not None:
        chat.ask(*pictures.in_line(arguments.question))
        return
    asking = "you: " if sys.stdin.isatty() else ""
    if asking:
        print("/help says what can be typed", file=sys.stderr)
    while not chat.left:
        try:
            line = input(asking)
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        try:
            chat.take(line.strip())
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)


@dataclass(frozen=True)
class Pictures:
    """Opens the images that are named: files, and URLs where they are allowed."""

    allow_urls: bool
    limits: UploadLimits = field(default_factory=UploadLimits)

    def open(self, where: str) -> Image.Image:
        """Read an image.

        Raises:
            UserError: it is missing, broken or too large, or a URL that must not or cannot be fetched.
        """
        if re.match("https?://", where, re.IGNORECASE):
            if not self.allow_urls:
                raise UserError(f"{where} is not fetched; save the image and give its path, or pass --allow_urls")
            return open_upload(fetch(where, self.limits.max_bytes), self.limits, name=where)
        if not _path(where).exists():
            raise UserError(f"image {where!r} does not exist")
        return open_upload(_path(where), self.limits, name=where, formats=FORMATS)

    def in_line(self, line: str) -> tuple[str, list[Image.Image]]:
        """The line without the images that it names, and those images in their order.

        A bare word that ends like an image's name is one only where there is such a file.

        Raises:
            UserError: as `open`.
        """
        images = []

        def take(match: re.Match) -> str:
            where = match["url"] or match["quoted"] or match["bare"].replace("\\ ", " ")
            if match["bare"] and "/" not in where and not _path(where).is_file():
                return match[0]
            images.append(self.open(where))
            return ""

        return " ".join(_IMAGE.sub(take, line).split()), images


def _path(where: str) -> Path:
    """Of a path or a file:// URL, as file managers paste them.

    Raises:
        UserError: a URL of something that is not on this machine.
    """
    return Path(local_path(where))


def _unquoted(where: str) -> str:
    quoted = len(where) > 1 and where[0] == where[-1] and where[0] in "\"'"
    return where[1:-1] if quoted else where.replace("\\ ", " ")


@dataclass
class Chat:
    """A conversation in the terminal.

    Attributes:
        seed: of the first turn's images; every later turn has the next one.
        output: folder for drawn images.
        pending: images that go with the next question.
        in_line: whether the output stands in the middle of a line.
        left: whether the user has taken leave.
    """

    opened: OpenModel
    options: AnswerOptions
    seed: int
    output: Path
    pictures: Pictures
    pending: list[Image.Image]
    conversation: Conversation = field(default_factory=Conversation)
    in_line: bool = False
    left: bool = False

    def take(self, line: str) -> None:
        """Do what a line says.

        Raises:
            UserError: it cannot be done; all is as before.
        """
        command, _, rest = line.partition(" ")
        commands = {"/draw": self._draw, "/image": self._add_image, "/save": self._save}
        if command in commands:
            if not rest.strip():
                raise UserError(f"{command} what? /help says how it is typed")
            commands[command](rest.strip())
        elif command == "/reset":
            self.conversation, self.pending = Conversation(), []
        elif command == "/help":
            print(_HELP)
        elif command == "/quit":
            self.left = True
        elif re.fullmatch("/[a-z]+", command) and not _path(command).exists():
            raise UserError(f"unknown command {command}; /help says which there are")
        elif line:
            text, images = self.pictures.in_line(line)
            if text:
                self.ask(text, images)
            else:
                self._wait_with(images)

    def ask(self, text: str, images: Sequence[Image.Image] = (), options: AnswerOptions | None = None) -> None:
        """Put a question, and write out the answer as it comes.

        Raises:
            UserError: it cannot be asked; the conversation and the images for it are as before.
        """
        opened, seed = self.opened, self.seed + self.conversation.num_turns
        answer = self.conversation.ask(
            opened.model, opened.processor, text, [*self.pending, *images], options or self.options, seed
        )
        before = self.conversation.messages
        try:
            for event in answer:
                self._show(event, text, seed)
        except KeyboardInterrupt:
            answer.close()
            print(" (stopped)", file=sys.stderr)
        except ValueError:
            answer.close()
            self.conversation.messages = before
            raise
        self.pending = []
        self._end_line()

    def _show(self, event: Event, asked: str, seed: int) -> None:
        if isinstance(event, TextDelta):
            print(event.text, end="", flush=True)
            self.in_line = not event.text.endswith("\n")
        elif isinstance(event, ImageStarted):
            print("(drawing)", file=sys.stderr)
        elif isinstance(event, ImageDrawn):
            self._end_line()
            seed += event.index
            made = self.options.drawing.settings() | {"turn": self.conversation.num_turns + 1}
            origin = Origin(asked, seed, self.opened.name, made, self.opened.weights)
            path = write_drawn(event.image, self.output, f"{file_name(asked)}_seed{seed}", origin)
            print(f"[image: {path}]", flush=True)

    def _end_line(self) -> None:
        if self.in_line:
            print(flush=True)
        self.in_line = False

    def _draw(self, prompt: str) -> None:
        self.ask(prompt, options=replace(self.options, image_first=True))

    def _add_image(self, where: str) -> None:
        self._wait_with([self.pictures.open(_unquoted(where))])

    def _wait_with(self, images: Sequence[Image.Image]) -> None:
        self.pending += images
        noun = "image" if len(self.pending) == 1 else "images"
        print(f"{len(self.pending)} {noun} for the next question", file=sys.stderr)

    def _save(self, folder: str) -> None:
        """Write the conversation as Hugging Face messages, with images by the names of their files."""

        def write(out: Path) -> None:
            messages, count = [], 0
            for message in self.conversation.messages:
                content = []
                for part in message["content"]:
                    if part["type"] == "image":
                        count += 1
                        part["image"].save(out / f"image{count}.png")
                        part = {"type": "image", "image": f"image{count}.png"}
                    content.append(part)
                messages.append({"role": message["role"], "content": content})
            (out / "conversation.json").write_text(json.dumps(messages, ensure_ascii=False, indent=2), encoding="utf-8")

        write_whole_folder(_path(_unquoted(folder)), write)
        print(_unquoted(folder))
