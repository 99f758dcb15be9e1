"""The questions that medical sites ask, in several wordings each. `{subject}` stands for the subject of a question."""

DEFINITION = (
    'What does the clinical term "{subject}" mean?',
    'Define the phenotype "{subject}".',
    'How is "{subject}" defined in medicine?',
    'A report mentions "{subject}". Explain what that is.',
)


LAY_TERM = (
    'How would you say "{subject}" to a patient in plain words?',
    'Put the medical term "{subject}" into everyday language.',
    'What is a lay expression for "{subject}"?',
    'A family asks what "{subject}" means. Which simple words would you use?',
)


SYSTEM = (
    'Which group of abnormalities does "{subject}" belong to?',
    'Under which part of the body or function is "{subject}" classified?',
    'Classify the finding "{subject}" by the system that it affects.',
    'Name the main heading for "{subject}".',
)


OWN_SYSTEM = (
    'Which group does our own scheme put "{subject}" into?',
    'Under which heading of this house is "{subject}" filed?',
    'Classify the finding "{subject}" by the scheme of this house.',
    'Name our own heading for "{subject}".',
)


FINDINGS = (
    "List typical clinical features of {subject}.",
    "Which phenotypes are seen in patients with {subject}?",
    "What findings would you look for in suspected {subject}?",
    "Describe the clinical picture of {subject} in a few terms.",
)


DIAGNOSIS = (
    "Which hereditary disease explains {subject}, together with the findings below?",
    "A patient shows {subject}, among other findings. Name the most likely genetic diagnosis.",
    "{subject}: what disorder do you suspect in a patient who has the further findings as well?",
    "Give a diagnosis that fits {subject} and the rest of the picture.",
)


INHERITANCE = (
    "How is {subject} inherited, and when does it begin?",
    "State the mode of inheritance and the age of onset of {subject}.",
    "What should a family know about inheritance and onset of {subject}?",
    "Give the inheritance pattern and usual onset for {subject}.",
)


GENES = (
    "Which gene is linked to {subject}?",
    "Where do you look for variants in a patient with {subject}?",
    "Name the genetic cause of {subject}.",
    "Genetic testing for {subject}: which gene should be on the panel?",
)


CODING = (
    'Which ICD-10-CM code applies to "{subject}"?',
    'Code the diagnosis "{subject}" in ICD-10-CM.',
    'The chart says "{subject}". Give the billing code and its title.',
    'Find the ICD-10-CM entry for "{subject}".',
)


DECODING = (
    "What does the ICD-10-CM code {subject} stand for?",
    "Explain the code {subject} and give an example of what is coded with it.",
    "A bill carries the ICD-10-CM code {subject}. What is the diagnosis?",
)


IMAGING_DEFINITION = (
    "What is {subject}, as a radiologist sees it?",
    "Give a short radiological definition of {subject}.",
    "Explain the entity {subject} and how it appears on imaging.",
)


IMAGING_FINDINGS = (
    "What are the imaging findings of {subject}?",
    "Describe what you expect to see: {subject}.",
    "List characteristic signs of {subject}.",
)


IMAGING_DIFFERENTIAL = (
    'What is the differential diagnosis of "{subject}"?',
    'Imaging shows "{subject}". Which diagnoses should be considered?',
    'Name possible causes of "{subject}".',
)
