"""What TRL imports from here."""


class NCCLTrainerSendWeightsArgs:
    """Not used."""


class NCCLWeightTransferEngine:
    """Not used."""
