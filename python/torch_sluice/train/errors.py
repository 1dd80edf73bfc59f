"""The one exception of the main job: a sentence for the user, which the command line prints as it is."""


class TrainError(Exception):
    """Something that the user can put right. The text names the argument, its value and what to do."""
