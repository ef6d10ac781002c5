FOLDER_OF_CHECKPOINTS = "checkpoints"
