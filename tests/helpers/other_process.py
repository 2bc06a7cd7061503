"""Calls in another process, for example against locks that this process holds."""

import multiprocessing

from evotok_plugin.errors import UserError


def in_other_process(function, *arguments):
    """The message of the UserError that a function raises in another process; empty without one."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def call():
        try:
            function(*arguments)
        except UserError as error:
            queue.put(str(error))
        else:
            queue.put("")

    process = context.Process(target=call)
    process.start()
    message = queue.get(timeout=60)
    process.join()
    return message
