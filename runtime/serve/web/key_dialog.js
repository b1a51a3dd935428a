// The dialog that asks for the server's API key.

/** Gives what the user enters, or null; says whether a key before was wrong. */
export function askForKey(wasWrong) {
  const dialog = document.querySelector("#key");
  dialog.querySelector(".bad-text").hidden = !wasWrong;
  const keyForm = dialog.querySelector("form");
  dialog.showModal();
  return new Promise((resolve) => {
    let given = null;
    keyForm.onsubmit = (event) => {
      event.preventDefault();
      given = keyForm.key.value;
      dialog.close();
    };
    dialog.querySelector(".cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      keyForm.reset();
      resolve(given);
    };
  });
}
