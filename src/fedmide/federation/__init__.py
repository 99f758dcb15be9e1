"""The federation's rounds: the messages, a site's work on a task, the server's work on the replies.

Nothing here imports torch. Only `runtimes` knows the transport of messages.
"""
