// Keeps the list's states current without touching a half-written form.
const PERIOD = 3000;

async function refresh() {
  if (!document.hidden) {
    try {
      const response = await fetch(location.href, { redirect: "error" });
      const page = new DOMParser().parseFromString(await response.text(), "text/html");
      const list = page.getElementById("emails");
      if (response.ok && list) document.getElementById("emails").replaceWith(list);
    } catch {
      // Logged out or offline: the list stays as it is.
    }
  }
  setTimeout(refresh, PERIOD);
}

setTimeout(refresh, PERIOD);
